"""Preference rows, read one by one from files, as a prompt and two answers to it; and the token rows they become.

    {"prompt": "1 and 1?", "chosen": "2", "rejected": "3"}
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}

A prompt in text is one question of a user. In the third form chosen and rejected are whole conversations that differ
in the last answer alone. Files are JSON Lines, JSON arrays, Parquet and ``hf:`` sets, as those of ``conversations.py``.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.conversations import Message, SchemaError
from workbench.errors import UserError
from workloads.conversations import Conversation, data_files, json_lines, messages_of, records, source_of
from workloads.encoding import Counts, Recipe, encode
from workloads.training.batches import IGNORE, Row

COLUMNS = "prompt, chosen and rejected"


@dataclass(frozen=True)
class Preference:
    """The messages of ``prompt``, and two answers of which ``chosen`` is the better. ``source`` is the row's own id, or
    FILE:ROW."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str

    def answered(self, answer: str) -> Conversation:
        """The prompt with that answer to it."""
        return Conversation([*self.prompt, Message("assistant", answer)], self.source)

    @property
    def line(self) -> str:
        """The row as a line of a set that can be trained on again."""
        prompt = self.answered("").turns[:-1]
        answers = {side: [{"role": "assistant", "content": getattr(self, side)}] for side in ("chosen", "rejected")}
        return json.dumps({"id": self.source, "prompt": prompt, **answers}) + "\n"


def preferences(paths: Sequence[Path]) -> Iterator[Preference]:
    """Every row of ``paths`` in order. Raises UserError with file and row of one that is no preference, and for a file
    without rows."""
    for file in data_files(paths):
        number = 0
        for number, record in records(file, COLUMNS):
            try:
                yield _preference(record, source_of(record, file, number))
            except SchemaError as error:
                raise UserError(f"{file}:{number}: {error}") from None
        if not number:
            raise UserError(f"data: no rows in {file}")


def read_preferences(file: Path, start: int = 0, end: int | None = None) -> Iterator[Preference]:
    """The rows whose ``line`` begins in the bytes ``[start, end)`` of ``file``."""
    for row in json_lines(file, start, end):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        yield Preference([Message(**turn) for turn in row["prompt"]], chosen, rejected, row["id"])


def _preference(record: Mapping[str, Any], source: str) -> Preference:
    missing = [name for name in ("chosen", "rejected") if record.get(name) is None]
    if missing:
        raise SchemaError(f"no {' and no '.join(missing)}: a row has {COLUMNS}, the prompt also within the other two")
    chosen, rejected = (_conversation(record, side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise SchemaError("chosen and rejected differ before their last message: they must answer the same prompt")
    return Preference(chosen[:-1], chosen[-1].content, rejected[-1].content, source)


def _conversation(record: Mapping[str, Any], side: str) -> list[Message]:
    """The prompt and the answer of one side. Raises SchemaError where they are none."""
    prompt, answer = record.get("prompt"), record[side]
    if not isinstance(answer, Sequence):
        raise SchemaError(f"{side} is neither a text nor a list of messages")
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    whole = not isinstance(answer, str) and bool(turns) and _role(turns[0]) != "assistant"
    if isinstance(prompt, str) and not whole:
        turns = [{"role": "user", "content": prompt}, *turns]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [*prompt, *turns]
    elif not whole:
        raise SchemaError(f"no prompt, and {side} is an answer alone: a row has {COLUMNS}")
    try:
        messages = messages_of({"messages": turns}, "chat")
    except SchemaError as error:
        raise SchemaError(f"{side}: {error}") from None
    if messages[-1].role != "assistant":
        raise SchemaError(f"{side} does not end with an answer")
    return messages


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def encode_preferences(rows: Sequence[Preference], tokenizer: Any, recipe: Recipe) -> tuple[list[Row], Counts]:
    """Two token rows for each pair, chosen and rejected, of which the answer is learned; and what became of them all,
    in pairs.

    Left out are pairs with an answer of no tokens, and those whose answers are alike. Over ``recipe.max_length`` both
    lose the same beginning of their prompt, so that they still answer one, and an answer that is longer alone loses its
    end. Raises UserError where the chat template does not take a conversation.
    """
    encoded: list[Row] = []
    counts = Counts()
    uncut = replace(recipe, max_length=sys.maxsize, train_on="last_answer")
    for row in rows:
        if row.chosen == row.rejected:
            counts += Counts(alike=1)
            continue
        sides, _ = encode([row.answered(row.chosen), row.answered(row.rejected)], tokenizer, uncut)
        if len(sides) < 2:
            counts += Counts(rows_dropped=1)
            continue
        starts = [next(place for place, label in enumerate(side.labels) if label != IGNORE) for side in sides]
        answer = max(len(side.ids) - start for side, start in zip(sides, starts, strict=True))
        room = max(1, recipe.max_length - answer)
        kept = [slice(max(0, start - room), max(0, start - room) + recipe.max_length) for start in starts]
        cut = [Row(side.ids[part], side.labels[part], side.sources) for side, part in zip(sides, kept, strict=True)]
        if cut[0].ids == cut[1].ids:
            counts += Counts(alike=1)
            continue
        encoded += cut
        lost = [len(side.ids) - len(short.ids) for side, short in zip(sides, cut, strict=True)]
        counts += Counts(
            rows=1,
            rows_cut=any(lost),
            answers_cut=any(part.stop < len(side.ids) for side, part in zip(sides, kept, strict=True)),
            tokens=sum(len(short.ids) for short in cut),
            targets=sum(short.targets for short in cut),
            tokens_lost=sum(lost),
            longest=max(len(side.ids) for side in sides),
            shortest_answer=answer,
            largest_id=max(max(short.ids) for short in cut),
        )
    return encoded, counts
