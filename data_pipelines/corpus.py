"""The documents of one audit while they are gathered, compared and written.

Rows arrive in any order and are spooled to 16 shards by their id; at the end each shard is sorted by id and written
once, with what was found out about duplicates and leaks. Memory: one shard of text, and 300 bytes a document.
"""

import shutil
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.audited import PHONE_REGION
from data_pipelines.duplicates import ShingleSets, shares_bucket, survivors
from data_pipelines.index import Index, conflicting, copies_of, copy_name
from data_pipelines.leakage import Leak, Runs, find_leaks, longest_shared
from data_pipelines.pii import KINDS
from data_pipelines.statistics import Statistics
from data_pipelines.words import words_of
from workbench.data_version import Version

SHARDS = 16
LARGEST = 10
SPOOL_ROWS = 2048
"""Rows of a row group of a spooled shard."""
READ_ROWS = 8192
"""Rows of a spooled shard that are looked at together."""
SAME_ROW = "the same row twice"
SAME_ID = "the same id twice"
INNER = ("reason", "normal_hash", "bands", "vocabulary", "grams", "prompt_hash", "answer_hash")
"""Columns that only the audit itself needs."""


def _first_of_equals(hashes: np.ndarray) -> np.ndarray:
    """The place of the first of those with the same hash (V16), for each."""
    halves = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 0], halves[:, 1]))  # stable: equals stay in order
    ordered = halves[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first


def shard_of(name: str) -> int:
    """Where a document goes by its id: by the first digit of one made of the content, so that these are in order from
    shard to shard, by a hash of a given one."""
    first = "0123456789abcdef".find(name[0]) if len(name) == 32 else -1
    return first if first >= 0 else zlib.crc32(name.encode()) % SHARDS


class Corpus:
    """Gather with ``add``, then ``compare``, then ``write``; ``statistics`` and the counts are there afterwards."""

    def __init__(self, documents: Path, quarantine: Path) -> None:
        self._folder = documents
        self._quarantine = quarantine
        self._partial = documents.with_name(".documents.partial")
        self._spool = documents.with_name(".documents.spool")
        self._writers: dict[tuple[str, int], pq.ParquetWriter] = {}
        self._waiting: dict[tuple[str, int], list[pa.Table]] = {}
        self._duplicates: dict[str, tuple[str, str, float]] = {}
        self._conflicts: dict[str, int] = {}
        self._holds: dict[str, tuple[str, str]] = {}
        self._runs: list[tuple[int, bytes]] = []
        self._own_runs: list[tuple[int, bytes]] = []
        self.index = Index()
        self.personal: Counter[str] = Counter()
        self.statistics = Statistics()
        self.quarantined: list[dict[str, str]] = []
        self.leaks: list[dict[str, Any]] = []
        self.evaluation_documents = self.without_runs = 0
        self.fingerprint = ""

    def __enter__(self) -> Self:
        for folder in (self._partial, self._spool):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._spool, ignore_errors=True)
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def rows(self) -> int:
        """How many rows were read and not quarantined."""
        return self.index.rows

    def add(self, batch: pa.Table, *, evaluation: bool = False) -> None:
        """Take the rows of ``measure.measure``, in any order, of one split; ``evaluation`` says that they must not be
        in the others."""
        reasons = np.asarray(batch["reason"].to_pylist())
        for row in batch.filter(pa.array(reasons != "")).select(["title", "source", "split", "reason"]).to_pylist():
            self.quarantined.append(row)
        for sample in batch["vocabulary"].to_pylist():
            if sample:
                self.statistics.sample_words(sample)
        good = batch.filter(pa.array(reasons == ""))
        if not good.num_rows:
            return
        if "grams" in good.column_names:
            runs = self._own_runs if evaluation else self._runs
            runs += ((self.rows + place, own) for place, own in enumerate(good["grams"].to_pylist()) if own)
        self.index.add(good)
        for kind in KINDS:
            self.personal[kind] += int(np.sum(good[f"{kind}s"].to_numpy()))
        rows = good.drop_columns([name for name in INNER if name in good.column_names])
        shard = np.array([shard_of(name) for name in good["id"].to_pylist()])
        order = np.argsort(shard, kind="stable")
        numbers, firsts = np.unique(shard[order], return_index=True)
        rows = rows.take(pa.array(order))
        split = good["split"][0].as_py()
        for number, first, end in zip(
            numbers.tolist(), firsts.tolist(), [*firsts.tolist()[1:], len(order)], strict=True
        ):
            self._spool_rows(split, number, rows.slice(first, end - first))

    def _spool_rows(self, split: str, shard: int, rows: pa.Table) -> None:
        """Write the rows with those that came before: a row group of some hundred rows costs as much as one of
        thousands."""
        waiting = self._waiting.setdefault((split, shard), [])
        waiting.append(rows)
        if sum(table.num_rows for table in waiting) >= SPOOL_ROWS:
            self._flush(split, shard)

    def _flush(self, split: str, shard: int) -> None:
        if waiting := self._waiting.pop((split, shard), []):
            rows = pa.concat_tables(waiting, promote_options="default").combine_chunks()
            self._writer(split, shard, rows.schema).write_table(rows)

    def evaluation_hashes(self) -> np.ndarray:
        """The n-gram hashes of the evaluation rows so far, sorted, each once."""
        parts = [np.frombuffer(own, dtype=np.uint64) for _, own in self._own_runs]
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)

    def compare(self, threshold: float, evaluation: Collection[str] = ()) -> None:
        """Decide within each split which documents survive (of each set of equals the longest, the smaller id between
        equals), and find what of the ``evaluation`` splits is in the others."""
        for split, shard in list(self._waiting):
            self._flush(split, shard)
        for writer in self._writers.values():
            writer.close()
        if not self.rows:
            return
        self.index.close()
        self._conflicts = conflicting(self.index)
        for split in self.index.splits:
            self._find_duplicates(self.index.of([split]), threshold)
        if evaluation:
            self._find_leaks(threshold, evaluation)

    def _find_duplicates(self, mine: np.ndarray, threshold: float) -> None:
        index = self.index
        order = mine[np.lexsort((mine, -index.characters[mine].astype(np.int64)))]
        first = _first_of_equals(index.hashes[order])
        again = first != np.arange(len(order))
        for place, equal in zip(order[again].tolist(), order[first[again]].tolist(), strict=True):
            self._duplicates[index.name(place)] = (index.name(equal), "exact", 1.0)
        compared = order[~again]
        compared = compared[shares_bucket(index.bands[compared])]
        sets = ShingleSets()
        number = np.empty(index.rows, dtype=np.int32)
        number[compared] = np.arange(len(compared), dtype=np.int32)
        for places, texts in self._read(compared):
            sets.add(number[places], [words_of(text) for text in texts])
        sets.close(len(compared))
        found = survivors(index.bands[compared], sets, threshold)
        for own, (near, similarity) in found.items():
            name = index.name(int(compared[own]))
            self._duplicates[name] = (index.name(int(compared[near])), "near", similarity)
        # The survivor of an exact duplicate may itself be a near duplicate: point at the one that is kept, which is as
        # similar to both.
        for name, (survivor, kind, _) in list(self._duplicates.items()):
            if kind == "exact" and survivor in self._duplicates:
                kept, _, similarity = self._duplicates[survivor]
                self._duplicates[name] = (kept, kind, similarity)

    def _find_leaks(self, threshold: float, evaluation: Collection[str]) -> None:
        index = self.index
        mine = index.of([split for split in index.splits if split in evaluation])
        others = index.of([split for split in index.splits if split not in evaluation])
        placed = [
            Runs.of((place, own) for at, own in runs if index.alive[place := int(index.places[at])])
            for runs in (self._own_runs, self._runs)
        ]
        leaks, holds = find_leaks(index, mine, others, (placed[0], placed[1]), self._texts, threshold)
        self._holds = {index.name(other): (index.name(own), kind) for other, (own, kind) in holds.items()}
        self._holds |= {index.name(leak.evaluation): (index.name(leak.training), leak.kind) for leak in leaks}
        self.evaluation_documents = len(mine)
        self.without_runs = len(mine) - len(np.intersect1d(mine, placed[0].documents))
        self.leaks = self._shown(leaks)

    def _shown(self, leaks: list[Leak]) -> list[dict[str, Any]]:
        """The leaks with the run of words that both sides share, a row each."""
        places = [place for leak in leaks for place in (leak.evaluation, leak.training)]
        texts = self._texts(np.unique(np.array(places, dtype=np.int64)))
        rows = []
        for leak in leaks:
            span = longest_shared(texts[leak.evaluation], texts[leak.training])
            row: dict[str, Any] = {"kind": leak.kind, "similarity": leak.similarity, "words": span.words}
            for side, place, parts in (
                ("evaluation", leak.evaluation, span.evaluation),
                ("training", leak.training, span.training),
            ):
                row[f"{side}_id"] = self.index.name(place)
                row[f"{side}_split"] = self.index.splits[self.index.split[place]]
                row |= {f"{side}_{name}": part for name, part in zip(("before", "span", "after"), parts, strict=True)}
            rows.append(row)
        return rows

    def write(self, phone_region: str) -> None:
        """Write the documents by id, the quarantine and the leaks; fills in the statistics. ``phone_region`` is that of
        the measures, which a redaction of these documents takes."""
        self.statistics.phone_region = phone_region
        version = Version()
        clusters = Counter(survivor for survivor, _, _ in self._duplicates.values())
        largest = dict(sorted(clusters.items(), key=lambda item: (-item[1], item[0]))[:LARGEST])
        for shard in range(SHARDS):
            files = [self._file(split, shard) for split in sorted(self.index.splits)]
            tables = [pq.read_table(file) for file in files if file.exists()]
            if not tables:
                continue
            table = pa.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]
            table = self._with_findings(self._unrepeated(table))
            version.add(table["id"].to_pylist(), table["text"].to_pylist())
            table = table.drop_columns(["content", "unnamed"])
            table = table.replace_schema_metadata({PHONE_REGION: phone_region})
            pq.write_table(table, self._partial / f"part-{shard:x}.parquet", compression="zstd")
            self.statistics.update(table, largest)
        self.statistics.largest.sort(key=lambda row: (-row["copies"], row["title"]))
        self.quarantined.sort(key=lambda row: (row["split"], row["source"], row["title"], row["reason"]))
        self.fingerprint = str(version)
        schema = pa.schema([(name, pa.string()) for name in ("title", "source", "split", "reason")])
        pq.write_table(pa.Table.from_pylist(self.quarantined, schema=schema), self._quarantine)
        if self.leaks:
            pq.write_table(pa.Table.from_pylist(self.leaks), self._quarantine.with_name("leaks.parquet"))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._partial.rename(self._folder)

    def _file(self, split: str, shard: int) -> Path:
        return self._spool / f"{self.index.splits.index(split)}-{shard:x}.parquet"

    def _writer(self, split: str, shard: int, schema: pa.Schema) -> pq.ParquetWriter:
        if (split, shard) not in self._writers:
            self._writers[split, shard] = pq.ParquetWriter(self._file(split, shard), schema)
        return self._writers[split, shard]

    def _texts(self, places: np.ndarray) -> dict[int, str]:
        """The texts of these documents, by their place in the index."""
        base = self.index.base[places]
        read = {
            place: text
            for found, texts in self._read(np.unique(base))
            for place, text in zip(found.tolist(), texts, strict=True)
        }
        return {place: read[own] for place, own in zip(places.tolist(), base.tolist(), strict=True)}

    def _read(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
        """(places, texts) of these documents, none a copy by name, some thousands at a time."""
        places = np.sort(places)
        ids, content = self.index.ids[places], self.index.content[places]
        splits = np.unique(self.index.split[places]).tolist()
        for file in [file for split in splits for file in sorted(self._spool.glob(f"{split}-*.parquet"))]:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=READ_ROWS, columns=["id", "text", "content"]):
                    own = np.array([name.encode() for name in batch["id"].to_pylist()])
                    at = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
                    wanted = np.flatnonzero((ids[at] == own) & (content[at] == batch["content"].to_numpy()))
                    # A row that is there twice counts once.
                    found, first = np.unique(places[at[wanted]], return_index=True)
                    yield found, batch["text"].take(pa.array(wanted[first])).to_pylist()

    def _unrepeated(self, table: pa.Table) -> pa.Table:
        """Sorted by id; of rows with one given id the one that the index counts stays, the others are quarantined."""
        table = table.sort_by([("id", "ascending"), ("content", "ascending")])
        names = table["id"].to_pylist()
        copies = copies_of(np.array(names)) * table["unnamed"].to_numpy()
        for place in np.flatnonzero(copies).tolist():
            names[place] = copy_name(names[place], copies[place])
        table = table.set_column(table.column_names.index("id"), "id", pa.array(names))
        ids = np.array([name.encode() for name in names])
        again = np.flatnonzero(np.concatenate([[False], ids[1:] == ids[:-1]]))
        if not len(again):
            return table
        texts = table["text"]
        rows = table.select(["title", "source", "split"]).take(again).to_pylist()
        for place, row in zip(again.tolist(), rows, strict=True):
            reason = SAME_ROW if texts[place] == texts[place - 1] else SAME_ID
            self.quarantined.append({**row, "reason": reason})
        return table.filter(pa.array(~np.isin(np.arange(len(ids)), again)))

    def _with_findings(self, table: pa.Table) -> pa.Table:
        ids = table["id"].to_pylist()
        entries = [self._duplicates.get(name, ("", "", 0.0)) for name in ids]
        table = table.append_column("keep", pa.array([not survivor for survivor, _, _ in entries]))
        table = table.append_column("duplicate_of", pa.array([survivor for survivor, _, _ in entries]))
        table = table.append_column("duplicate_kind", pa.array([kind for _, kind, _ in entries]))
        table = table.append_column("similarity", pa.array([s for _, _, s in entries], pa.float32()))
        if "flags" in table.column_names:
            table = table.append_column("conflicts", pa.array([self._conflicts.get(n, 0) for n in ids], pa.int32()))
        if len(self.index.splits) > 1:
            held = [self._holds.get(name, ("", "")) for name in ids]
            table = table.append_column("leak", pa.array([kind for _, kind in held], pa.string()))
            table = table.append_column("leak_of", pa.array([other for other, _ in held], pa.string()))
        return table
