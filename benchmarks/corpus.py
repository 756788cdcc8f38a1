"""``python -m benchmarks.corpus --rows 500000 --out runs/corpus``: real passages with faults that are known exactly.

``train/`` and ``test/`` are Parquet with id, title, source and text (``train/`` also has files with broken rows), and
``planted.json`` says what was planted where. Natural duplicates are left in. The same packages, rows and seed give the
same corpus; memory is some thousand texts. Packages are kept in ``--cache`` for the next time.
"""

import json
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks import broken, debian_docs, planting
from benchmarks.debian_docs import Passage
from benchmarks.planting import Loneliness
from workbench.config import runs_root
from workbench.errors import UserError

SHARD_ROWS = 10_000
SEED = 26
CANDIDATES = 8
"""How many texts are looked at for each that is to be lone."""
PROCESSES = 2
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "source", "text")])


@dataclass(frozen=True)
class Plan:
    """How many of each fault there are among ``rows`` documents; ``of`` gives a benchmark's share of each."""

    rows: int
    exact: int
    near: int
    personal: int
    leaks: int
    clean: int
    broken: int

    @classmethod
    def of(cls, rows: int) -> "Plan":
        """At 500,000: 2,500 exact copies, 300 near ones at each level, 150 pieces of personal data of each kind, 250
        leaks of each kind, 2,000 evaluation texts that leak nothing, 40 broken rows of each kind."""
        if rows < 200:
            raise UserError("rows: a corpus has at least 200")
        parts = {"exact": 2500, "near": 300, "personal": 150, "leaks": 250, "clean": 2000, "broken": 40}
        return cls(rows, **{name: max(2, round(number * rows / 500_000)) for name, number in parts.items()})

    @property
    def lone(self) -> int:
        """Texts that must be lone."""
        kinds = len(planting.PERSONAL) + len(planting.LOOKALIKES)
        return self.exact + self.near * len(planting.LEVELS) + self.personal * kinds + 6 * self.leaks + self.clean

    @property
    def natural(self) -> int:
        """Passages that are needed: the other rows are copies of these, and good rows among the broken."""
        return self.rows - self.exact - self.near * len(planting.LEVELS) - 2 * self.leaks - 2 * self.broken


@dataclass
class Planted:
    """What is in ``planted.json``: ids of documents and of their partners, kinds, similarities, and of rows that
    cannot be read the source and the reason that the audit gives."""

    rows: int = 0
    seed: int = SEED
    packages: list[str] = field(default_factory=list)
    exact: list[dict[str, Any]] = field(default_factory=list)
    near: list[dict[str, Any]] = field(default_factory=list)
    personal: list[dict[str, Any]] = field(default_factory=list)
    lookalikes: list[dict[str, Any]] = field(default_factory=list)
    leaks: list[dict[str, Any]] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Changes:
    """What planting does to the passages, by their numbers: other texts, texts put after them, and those taken away."""

    texts: dict[int, str] = field(default_factory=dict)
    after: dict[int, list[tuple[str, Passage]]] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)
    test: list[tuple[str, Passage]] = field(default_factory=list)


def build(passages: Iterator[Passage], out: Path, plan: Plan, packages: list[str], seed: int = SEED) -> Planted:
    """Write the corpus; whatever ``out`` held is replaced. Raises UserError where there are too few passages, or too
    few that are like no other."""
    shutil.rmtree(out, ignore_errors=True)
    spool = out / ".passages"
    spool.mkdir(parents=True)
    rng = random.Random(seed)
    eligible = _spool(passages, spool, plan.natural)
    shards = sorted(spool.glob("*.parquet"))
    numbers = sorted(rng.sample(eligible, min(len(eligible), CANDIDATES * plan.lone)))
    candidates = dict(zip(numbers, _take(shards, numbers), strict=True))
    lone = _lone(shards, [passage.text for passage in candidates.values()])
    if len(lone) < plan.lone:
        raise UserError(f"only {len(lone)} of {len(numbers)} texts are like no other, and {plan.lone} are needed")
    chosen = [numbers[place] for place in lone]
    rng.shuffle(chosen)
    planted = Planted(rows=plan.rows, seed=seed, packages=packages)
    changes = _plant(plan, planted, {number: candidates[number] for number in chosen}, rng)
    _write(shards, out, changes)
    planted.broken = broken.write(out / "train", plan.broken, rng)
    shutil.rmtree(spool)
    (out / "planted.json").write_text(json.dumps(asdict(planted), indent=1))
    return planted


def _spool(passages: Iterator[Passage], folder: Path, rows: int) -> list[int]:
    """Write the first ``rows`` passages; the numbers of those that faults may be planted into."""
    eligible, batch, number = [], [], 0
    for passage in passages:
        if passage.text.isascii() and planting.has_no_personal_data(passage.text):
            eligible.append(number)
        batch.append(passage)
        number += 1
        if len(batch) == SHARD_ROWS or number == rows:
            table = pa.Table.from_pylist([each._asdict() for each in batch])
            pq.write_table(table, folder / f"{number:09d}.parquet")
            batch = []
        if number == rows:
            if isinstance(passages, Generator):
                passages.close()  # ends the processes that read
            return eligible
    raise UserError(f"rows: the packages have {number:,} passages, and {rows:,} are needed: ask for fewer rows")


def _passages(shard: Path) -> list[Passage]:
    return [Passage(**row) for row in pq.read_table(shard).to_pylist()]


def _take(shards: list[Path], numbers: list[int]) -> Iterator[Passage]:
    """The passages of these numbers, which are in order."""
    wanted = iter(numbers)
    number, start = next(wanted, -1), 0
    for shard in shards:
        passages = _passages(shard)
        while start <= number < start + len(passages):
            yield passages[number - start]
            number = next(wanted, -1)
        start += len(passages)


def _lone(shards: list[Path], texts: list[str]) -> list[int]:
    loneliness = Loneliness(texts)
    if len(shards) < 4:  # less work than starting processes
        for shard in shards:
            loneliness.add(loneliness.count(pq.read_table(shard, columns=["text"])["text"].to_pylist()))
        return loneliness.lone()
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, initializer=_remember, initargs=(texts,)) as pool:
        for found in pool.imap_unordered(_count, shards):
            loneliness.add(found)
    return loneliness.lone()


_counting: list[Loneliness] = []


def _remember(texts: list[str]) -> None:
    _counting[:] = [Loneliness(texts)]


def _count(shard: Path) -> dict[int, Any]:
    return _counting[0].count(pq.read_table(shard, columns=["text"])["text"].to_pylist())


def name_of(number: int) -> str:
    """The id of a natural passage."""
    return f"doc-{number:07d}"


def _plant(plan: Plan, planted: Planted, lone: dict[int, Passage], rng: random.Random) -> _Changes:
    changes = _Changes()
    unused = iter(lone.items())

    def copy(name: str, passage: Passage, text: str) -> None:
        after = changes.after.setdefault(rng.randrange(plan.natural), [])
        after.append((name, passage._replace(text=text)))

    for at in range(plan.exact):
        number, passage = next(unused)
        copy(f"exact-{at:05d}", passage, planting.exact_copy(passage.text, rng))
        planted.exact.append({"id": f"exact-{at:05d}", "of": name_of(number)})
    for at, level in enumerate(level for level in planting.LEVELS for _ in range(plan.near)):
        number, passage = next(unused)
        text, similarity = planting.near_copy(passage.text, level, rng)
        copy(f"near-{at:05d}", passage, text)
        planted.near.append({"id": f"near-{at:05d}", "of": name_of(number), "level": level, "jaccard": similarity})
    for kinds, noted in ((planting.PERSONAL, planted.personal), (planting.LOOKALIKES, planted.lookalikes)):
        for kind, make in kinds.items():
            for _ in range(plan.personal):
                number, passage = next(unused)
                changes.texts[number] = planting.put_into(passage.text, f"{make(rng)} ", rng)
                noted.append({"id": name_of(number), "kind": kind})
    _plant_leaks(plan, planted, unused, changes, rng)
    return changes


def _plant_leaks(
    plan: Plan, planted: Planted, unused: Iterator[tuple[int, Passage]], changes: _Changes, rng: random.Random
) -> None:
    def evaluate(passage: Passage, text: str) -> str:
        name = f"eval-{len(changes.test):06d}"
        changes.test.append((name, passage._replace(text=text)))
        return name

    for _ in range(plan.leaks):
        number, passage = next(unused)
        name = evaluate(passage, planting.exact_copy(passage.text, rng))
        planted.leaks.append({"id": name, "of": name_of(number), "kind": "exact"})
        number, passage = next(unused)
        text, similarity = planting.near_copy(passage.text, rng.choice((0.95, 0.9, 0.85, 0.8)), rng)
        name = evaluate(passage, text)
        planted.leaks.append({"id": name, "of": name_of(number), "kind": "near", "jaccard": similarity})
        for words, kind in ((planting.RUN, "ngram"), (planting.RUN - 1, "")):  # one word less is no leak
            (number, passage), (host, hosting) = next(unused), next(unused)
            name = evaluate(hosting, planting.with_run(hosting.text, passage.text, words, rng))
            changes.moved.add(host)
            planted.leaks.append({"id": name, "of": name_of(number), "kind": kind, "words": words})
    for _ in range(plan.clean):
        number, passage = next(unused)
        changes.moved.add(number)
        planted.clean.append(evaluate(passage, passage.text))
    rng.shuffle(changes.test)


def _write(shards: list[Path], out: Path, changes: _Changes) -> None:
    number = 0
    for folder in ("train", "test"):
        (out / folder).mkdir()
    for part, shard in enumerate(shards):
        rows: list[tuple[str, Passage]] = []
        for passage in _passages(shard):
            if number not in changes.moved:
                rows.append((name_of(number), passage._replace(text=changes.texts.get(number, passage.text))))
            rows += changes.after.get(number, [])
            number += 1
        _write_rows(rows, out / "train" / f"part-{part:04d}.parquet")
    _write_rows(changes.test, out / "test" / "part-0000.parquet")


def _write_rows(rows: list[tuple[str, Passage]], path: Path) -> None:
    columns = [[name for name, _ in rows], *(list(each) for each in zip(*(p for _, p in rows), strict=True))]
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def build_from_packages(out: Path, rows: int, cache: Path) -> Planted:
    """Fetch the packages and build."""
    folder, packages = debian_docs.download(cache)
    return build(debian_docs.read(folder, PROCESSES), out, Plan.of(rows), packages)


def main(
    out: Annotated[Path, typer.Option(help="the folder to write; what it holds is replaced")],
    rows: Annotated[int, typer.Option(help="documents of both splits together")] = 500_000,
    cache: Annotated[Path | None, typer.Option(help="where packages are kept; else in the runs root")] = None,
) -> None:
    """Build the corpus of the data benchmarks from Debian's documentation packages."""
    began = time.monotonic()
    try:
        planted = build_from_packages(out, rows, cache or runs_root() / "cache" / "debian-docs")
    except UserError as error:
        sys.exit(f"error: {error}")
    faults = {name: len(getattr(planted, name)) for name in ("exact", "near", "personal", "leaks", "clean", "broken")}
    print(f"{rows:,} documents in {out} after {time.monotonic() - began:.0f} s; planted {faults}")


if __name__ == "__main__":
    typer.run(main)
