"""The rows of a fine-tuning, before any card is asked for: dealt into parts, tokenized, counted and checked.

Artifacts: ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of the run. What is trained on are the token rows
made from the first two, which later runs, trials and resumed workers find again (``tokenized.py``).
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError
from workbench.runs import Run
from workloads.chat_templates import load_tokenizer, render
from workloads.conversations import Conversation, conversations, read_conversations, write_conversations
from workloads.dpo import DpoConfig
from workloads.encoding import Counts, Recipe, encode
from workloads.instructions import as_conversation, load_instructions, write_jsonl
from workloads.preferences import Preference, encode_preferences, preferences, read_preferences
from workloads.sources import CHEMISTRY, check_weights
from workloads.streaming import check_room, open_stream
from workloads.tokenized import TokenRows, cache_folder, check_known, tokenize
from workloads.training.batches import Batches, Row
from workloads.training.dealing import Deal
from workloads.training.pairs import Pairs
from workloads.training.resume import STREAM

if TYPE_CHECKING:
    from workloads.sft import SftConfig

LOOKED_AT = 50
"""Rows of a data set that are rendered before there is a run: a template that does not fit fails on the first ones."""
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """The folders of the token rows; questions with their answers for samples; ``facts`` on the data and ``counts`` on
    the training rows; and of packed rows the share of their sequences that is tokens. Of rows that are streamed
    ``train`` is the file of conversations, and the counts come when training has ended."""

    train: Path
    validation: Path
    questions: list[tuple[str, str]]
    facts: dict[str, Any]
    counts: Counts
    packed: float | None

    @property
    def summary(self) -> dict[str, Any]:
        """The figures that a summary has: nothing is cut or left out in silence."""
        counts = self.counts
        figures = {
            "rows": counts.rows, "tokens": counts.tokens, "targets": counts.targets, "truncated": counts.rows_cut,
            "answers_cut": counts.answers_cut, "tokens_lost": counts.tokens_lost, "rows_dropped": counts.rows_dropped,
        }  # fmt: skip
        return figures if self.packed is None else {**figures, "packing_efficiency": self.packed}


def recipe_of(config: "SftConfig | DpoConfig") -> Recipe:
    """How the rows of ``config`` are made."""
    if isinstance(config, DpoConfig):
        return Recipe(config.base, config.chat_template, config.max_length, "last_answer", pairs=True)
    return Recipe(config.base, config.chat_template, config.max_length, config.train_on)


def batches_of(rows: Sequence[Row], config: "SftConfig | DpoConfig") -> Batches:
    """The batches of ``rows``, packed or not, or of the pairs that they make. Raises UserError for too few rows."""
    if isinstance(config, DpoConfig):
        return Batches(Pairs(rows), config.batch_size, config.seed)
    return Batches(rows, config.batch_size, config.seed, config.max_length if config.packing else 0)


def look(config: "SftConfig | DpoConfig") -> None:
    """Raise UserError where the tokenizer, the template or the first rows of the data cannot be used, and where the
    base has no weights."""
    tokenizer = load_tokenizer(config.base, config.chat_template)
    if isinstance(config, DpoConfig):
        pairs = [row for row, _ in zip(preferences(config.data), range(LOOKED_AT), strict=False)]
        encode_preferences(pairs, tokenizer, recipe_of(config))
    elif config.data != CHEMISTRY:
        files = [Path(file) for file in config.data]
        rows = [row for row, _ in zip(conversations(files), range(LOOKED_AT), strict=False)]
        encode(rows, tokenizer, recipe_of(config))
    check_weights("base", config.base)


def prepare(config: "SftConfig | DpoConfig", run: Run) -> Prepared:
    """Deal the rows and tokenize them, by Ray Data where they are many, and say what was cut.

    Raises UserError for rows that cannot be used, that leave nothing to learn, that fill no batch, or whose tokens the
    model does not have.
    """
    if isinstance(config, DpoConfig) or config.data != CHEMISTRY:
        facts = _deal_files(config, run)
    else:
        facts = _deal_chemistry(config, run)
    if Path(config.base).is_dir():
        run.input("base", path=Path(config.base))
    else:
        run.input("base", hub_name=config.base)
    run.input("train", path=run.artifact("train.jsonl"), data=str(config.data), **facts)
    streamed = not isinstance(config, DpoConfig) and config.streaming
    words, made = {"train": "training", "validation": "held-out"}, {}
    for part in ("validation",) if streamed else ("train", "validation"):
        made[part] = tokenize(run.artifact(f"{part}.jsonl"), recipe_of(config), cache_folder(), spread=True)
        counts = TokenRows(made[part]).counts
        _check_learnable(config, words[part], counts)
        check_known(config.base, counts.largest_id, _known_tokens(config.base))
        _check_positions(config, counts)
    watched, questions = TokenRows(made["validation"]).counts.rows, _questions(config, run)
    if streamed:
        run.say(
            f"{watched:,} rows to watch, {facts['held out']:,} held out; the others are tokenized while training runs"
        )
        return Prepared(run.artifact("train.jsonl"), made["validation"], questions, facts, Counts(), None)
    train = TokenRows(made["train"])
    batches = batches_of(train, config)
    packed = None if isinstance(config, DpoConfig) or not config.packing else batches.efficiency
    ready = Prepared(made["train"], made["validation"], questions, facts, train.counts, packed)
    run.say(f"{train.counts.rows:,} rows to train on, {watched:,} to watch, {facts['held out']:,} held out")
    run.say(_told(config, ready))
    return ready


def open_rows(config: "SftConfig", run: Run) -> Any:
    """The actor that tokenizes the training rows while training runs. Raises UserError where no CPU is left for it."""
    check_room(config.request().cpu or 0.0, config.workers)
    deal = Deal(config.batch_size, config.seed, config.max_length if config.packing else 0)
    file, known = run.artifact("train.jsonl"), _known_tokens(config.base)
    return open_stream(file, recipe_of(config), deal, known=known, ledger=run.folder / STREAM)


def close_rows(config: "SftConfig", prepared: Prepared, stream: Any, run: Run) -> Prepared:
    """``prepared`` with what became of the rows that ``stream`` tokenized, which is said."""
    import ray

    told, hosts = ray.get(stream.told.remote())
    ray.kill(stream)
    facts = prepared.facts | {f"tokenized on {host}": rows for host, rows in sorted(hosts.items())}
    packed = told.tokens / (told.sequences * config.max_length) if config.packing else None
    done = replace(prepared, facts=facts, counts=told.counts, packed=packed)
    run.say(_told(config, done))
    return done


def _deal_chemistry(config: "SftConfig", run: Run) -> dict[str, Any]:
    data = load_instructions(
        CHEMISTRY, split_seed=config.split_seed, seed=config.seed, limit=_limit(config), held_out=config.validation_rows
    )
    for part, rows in (("train", data.train), ("validation", data.validation)):
        named = (as_conversation(row, f"{row['smiles']} {row['task']}") for row in rows)
        write_conversations(named, run.artifact(f"{part}.jsonl"))
    write_jsonl(data.test, run.artifact("test.jsonl"))
    return {**data.facts, "held out": len(data.test)}


def _deal_files(config: "SftConfig | DpoConfig", run: Run) -> dict[str, Any]:
    """Deal 90 : 5 : 5 by ``split_seed``, and of the training rows as many as the steps will see. Two passes over the
    files: nothing is written before every row was found good, and no more than a part's number is held for a row."""
    files = [Path(file) for file in config.data]

    def rows() -> Iterator[Conversation | Preference]:
        yield from preferences(files) if isinstance(config, DpoConfig) else conversations(files)

    count = sum(1 for _ in rows())
    if count < len(PARTS):
        raise UserError(f"{', '.join(map(str, files))}: {count} rows are too few to hold any out: give at least three")
    part_of = deal(count, config.split_seed, config.seed, _limit(config), config.validation_rows)
    with ExitStack() as stack:
        streams = [stack.enter_context(run.artifact(f"{part}.jsonl").open("w", encoding="utf-8")) for part in PARTS]
        for row, part in zip(rows(), part_of, strict=True):
            if part < len(PARTS):
                streams[part].write(row.line)
    return {"rows": count, "held out": part_of.count(PARTS.index("test"))}


def deal(count: int, split_seed: int, seed: int, limit: int, held_out: int) -> bytearray:
    """For each of ``count`` rows its place in ``PARTS``, or one past them where it is not needed."""
    order = list(range(count))
    random.Random(f"split {split_seed}").shuffle(order)
    cut = max(1, count // 20)
    parts = {"test": order[:cut], "validation": order[cut : 2 * cut], "train": order[2 * cut :]}
    for rows in parts.values():
        random.Random(f"order {seed}").shuffle(rows)
    part_of = bytearray([len(PARTS)]) * count
    wanted = {"train": limit, "validation": held_out, "test": count}
    for place, part in enumerate(PARTS):
        for index in parts[part][: wanted[part]]:
            part_of[index] = place
    return part_of


def _limit(config: "SftConfig | DpoConfig") -> int:
    """The most rows that the steps can see; packed, a sequence takes as many as fit."""
    packed = not isinstance(config, DpoConfig) and config.packing
    return 10**12 if packed else config.steps * config.batch_size


def _check_learnable(config: "SftConfig | DpoConfig", part: str, counts: Counts) -> None:
    if not counts.rows:
        if isinstance(config, DpoConfig):
            raise UserError(
                f"none of the {part} rows prefers an answer: in {counts.alike:,} chosen and rejected are alike, in "
                f"{counts.rows_dropped:,} one of them is empty; does the chat template write the answers?"
            )
        raise UserError(
            f"none of {counts.rows_dropped:,} {part} rows has an answer to learn: are the roles right, does the chat "
            f"template write the answers, and is train_on={config.train_on} what you want?"
        )
    if counts.answers_cut == counts.rows:
        raise UserError(
            f"max_length={config.max_length} is shorter than every answer of the {part} rows: the shortest has "
            f"{counts.shortest_answer} tokens with its end, give max_length={counts.shortest_answer + 1} or more"
        )


def _check_positions(config: "SftConfig | DpoConfig", counts: Counts) -> None:
    """Refuse rows that are longer than the base's table of positions, in which a worker would look beyond the end."""
    from workloads.training.trainable import positions_of

    packed = not isinstance(config, DpoConfig) and config.packing  # positions of padding count up to max_length
    longest = config.max_length if packed else min(counts.longest, config.max_length)
    known = positions_of(config.base)
    if known is not None and longest > known:
        raise UserError(
            f"base: {config.base} has learned {known} positions, and sequences have up to {longest} tokens: give "
            f"max_length={known}"
        )


def _known_tokens(base: str) -> int:
    """How many tokens the model at ``base``, or that of an adapter there, knows."""
    from transformers import AutoConfig

    folder = Path(base)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    known: int = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    return known


def _questions(config: "SftConfig | DpoConfig", run: Run) -> list[tuple[str, str]]:
    """Prompts of held-out rows with the answers that they should have, for samples."""
    if not config.sample_every:
        return []
    tokenizer = load_tokenizer(config.base, config.chat_template)
    file = run.artifact("validation.jsonl")
    rows = read_conversations(file)
    if isinstance(config, DpoConfig):
        rows = (row.answered(row.chosen) for row in read_preferences(file))
    return [_question(row, tokenizer) for row, _ in zip(rows, range(config.sample_prompts), strict=False)]


def _question(row: Conversation, tokenizer: Any) -> tuple[str, str]:
    last = max(place for place, turn in enumerate(row.turns) if turn["role"] == "assistant")
    return render(row.turns[:last], tokenizer, prompt=True), row.turns[last]["content"]


def _told(config: "SftConfig | DpoConfig", made: Prepared) -> str:
    counts = made.counts
    said = [f"{counts.tokens:,} tokens, {counts.targets:,} of them learned"]
    if made.packed is not None:
        said.append(f"packed into sequences of {config.max_length}, {made.packed:.1%} of them tokens")
    if counts.rows_cut:
        said.append(
            f"max_length={config.max_length} cut {counts.rows_cut:,} rows by {counts.tokens_lost:,} tokens "
            f"({counts.answers_cut:,} at the end of the answer; the longest row has {counts.longest:,})"
        )
    if counts.alike:
        said.append(f"{counts.alike:,} rows whose chosen and rejected answers are alike were left out")
    if counts.rows_dropped:
        said.append(f"{counts.rows_dropped:,} rows without an answer were left out")
    return "; ".join(said)


def rows_table(made: Prepared) -> list[dict[str, Any]]:
    """What became of the training rows, for the report."""
    words = {
        "rows": "rows trained on", "rows_dropped": "rows left out: no answer to learn", "rows_cut": "rows cut",
        "answers_cut": "rows cut at the end of the answer, too", "tokens": "tokens", "targets": "tokens learned",
        "tokens_lost": "tokens cut off", "longest": "tokens of the longest row, before it was cut",
    }  # fmt: skip
    table: list[dict[str, Any]] = [{"what": text, "count": getattr(made.counts, name)} for name, text in words.items()]
    if made.counts.alike:
        table.append({"what": "rows left out: chosen and rejected are alike", "count": made.counts.alike})
    if made.packed is not None:
        table.append({"what": "share of the packed sequences that is tokens", "count": f"{made.packed:.1%}"})
    return table
