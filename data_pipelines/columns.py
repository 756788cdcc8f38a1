"""The column mapping: how one row of a table becomes a document."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.sources import Row, is_sound
from workbench.conversations import ExchangeColumns, Form, SchemaError, looks_like, read_exchange
from workbench.errors import UserError

LONGEST_ID = 128
"""Bytes of a given id: it is a key in Milvus and in memory."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold a document's text, title, source and id; all but the text may be empty.

    With a ``form`` other than text a row is an exchange, and ``exchange`` names its columns.
    """

    text: str = "text"
    title: str = ""
    source: str = ""
    id: str = ""
    form: Form = "text"
    exchange: ExchangeColumns = field(default_factory=ExchangeColumns)

    def needed(self) -> list[str]:
        """The columns that a table must have, each once."""
        document = [self.text] if self.form == "text" else self.exchange.needed(self.form)
        return list(dict.fromkeys(filter(None, (*document, self.title, self.source, self.id))))

    def wanted(self) -> list[str]:
        """The columns that are read, each once; some may be absent."""
        return list(dict.fromkeys([*self.needed(), *self.exchange.wanted(self.form)]))

    def check(self, present: list[str], place: str) -> None:
        """Raise UserError if a table at ``place`` with the columns ``present`` lacks one."""
        missing = [column for column in self.needed() if column not in present]
        if not missing:
            return
        key = next((name for name in ("text", "title", "source", "id") if getattr(self, name) == missing[0]), "text")
        form = looks_like(present)
        hint = f"name one with {key}_column=NAME"
        if self.form == "text" and form:
            hint = f"it looks like an instruction set: say form={form}"
        elif self.form != "text":
            hint = "name the columns of the exchange: instruction_column, output_column, messages_column"
        raise UserError(f"{place}: no column '{missing[0]}'; it has {', '.join(present)}: {hint}")

    def row(self, record: Mapping[str, Any], place: str) -> Row:
        """The document that ``record`` holds; without one a row that says why."""
        row = self._document(record, place)
        return row if all(map(is_sound, row)) else Row(place, "", place, "undecodable row")

    def _document(self, record: Mapping[str, Any], place: str) -> Row:
        title = _words(record.get(self.title)) or place
        source = _words(record.get(self.source)) or place
        key = ""
        if self.id:
            given = record.get(self.id)
            if given is None or given == "":
                return Row(title, "", source, "id is missing")
            key = str(given)
            if len(key.encode("utf-8", "replace")) > LONGEST_ID:
                return Row(title, "", source, f"id is longer than {LONGEST_ID} bytes")
            if "\0" in key:
                return Row(title, "", source, "id has a NUL character")
        if self.form != "text":
            return self._exchange(record, title, source, key)
        text = record.get(self.text)
        if isinstance(text, str):
            return Row(title, text, source, "", key)
        reason = "text is missing" if text is None else f"text is no text but {type(text).__name__}"
        return Row(title, "", source, reason, key)

    def _exchange(self, record: Mapping[str, Any], title: str, source: str, key: str) -> Row:
        try:
            messages = read_exchange(record, self.form, self.exchange)
        except SchemaError as error:
            return Row(title, "", source, f"schema: {error}", key)
        text = "\n\n".join(message.content for message in messages)
        parts = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
        return Row(title, text, source, "", key, parts)


def readable(
    read: Callable[[int, int], Sequence[dict[str, Any]]], first: int, end: int
) -> Iterator[dict[str, Any] | str]:
    """The records ``first`` to ``end`` that ``read`` gives; in place of one with a cell that Python cannot hold (broken
    text, a time out of range) the reason. What cannot be read at once is read in halves."""
    try:
        records: Sequence[dict[str, Any] | str] = read(first, end)
    except (ValueError, OverflowError) as error:
        if end - first > 1:
            middle = (first + end) // 2
            yield from readable(read, first, middle)
            yield from readable(read, middle, end)
            return
        records = [_unreadable(error)]
    yield from records


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "undecodable row"
    if isinstance(error, OverflowError):
        return "a number or time out of range"
    return f"unreadable row ({type(error).__name__})"


def _words(value: Any) -> str:
    return "" if value is None else str(value)
