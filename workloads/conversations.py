"""Rows to fine-tune on, read one by one from files in any of the usual forms, as conversations.

    alpaca    {"instruction": ..., "input": ..., "output": ...}
    sharegpt  {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    chat      {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    documents of ``data audit`` and ``data filter`` that were read from one of these

A file is JSON Lines, one JSON array, or Parquet; a folder is its files; ``hf:NAME`` or ``hf:NAME:SPLIT`` is a data set
of the hub, or a folder that ``datasets`` wrote. The form is told by the first row of each.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.conversations import ExchangeColumns, Form, Message, SchemaError, looks_like, read_exchange
from workbench.errors import UserError
from workloads.sources import HUB

SUFFIXES = (".jsonl", ".json", ".parquet")
HALF_PAIR = re.compile("[\ud800-\udfff]")
FORMS = "instruction and output (Alpaca), conversations (ShareGPT) or messages (chat)"


@dataclass(frozen=True)
class Conversation:
    """Turns of system, user, assistant and tool, an answer among them. ``source`` is the row's own id, or FILE:ROW."""

    messages: list[Message]
    source: str

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]

    @property
    def line(self) -> str:
        """The row as a line of a chat set that can be trained on again."""
        return json.dumps({"id": self.source, "messages": self.turns}) + "\n"


def source_of(record: Mapping[str, Any], file: Path, number: int) -> str:
    """The row's own id, or FILE:ROW."""
    key = record.get("id")
    return str(key) if isinstance(key, str | int) and key != "" else f"{file.name}:{number}"


def data_files(paths: Sequence[Path]) -> list[Path]:
    """``paths`` with folders replaced by the files in them, by name. Raises UserError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UserError(f"data: no {', '.join(SUFFIXES)} file in {path}")
        files += found
    return files


def conversations(paths: Sequence[Path]) -> Iterator[Conversation]:
    """Every row of ``paths`` in order. Raises UserError with file and row of one that is not of its file's form, and
    for a file without rows."""
    return (conversation for conversation, _ in with_records(paths))


def with_records(paths: Sequence[Path]) -> Iterator[tuple[Conversation, dict[str, Any]]]:
    """As ``conversations``, each with the columns that it was read from."""
    for file in data_files(paths):
        form: Form | None = None
        for number, record in records(file):
            place = f"{file}:{number}"
            form = form or _form(record, place)
            try:
                messages = messages_of(record, form)
            except SchemaError as error:
                raise UserError(f"{place}: {error}") from None
            yield Conversation(messages, source_of(record, file, number)), record
        if form is None:
            raise UserError(f"data: no rows in {file}")


def write_conversations(rows: Iterable[Conversation], file: Path) -> None:
    """Each row's line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(row.line for row in rows)


def read_conversations(file: Path, start: int = 0, end: int | None = None) -> Iterator[Conversation]:
    """What ``write_conversations`` wrote, or the lines of it that begin in the bytes ``[start, end)``."""
    return map(conversation_of, json_lines(file, start, end))


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a line that ``write_conversations`` wrote."""
    return Conversation([Message(**turn) for turn in row["messages"]], row["id"])


def json_lines(file: Path, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects on the lines of ``file`` that begin in the bytes ``[start, end)``."""
    with file.open("rb") as stream:
        stream.seek(start)
        while (end is None or stream.tell() < end) and (line := stream.readline()):
            yield json.loads(line)


def records(file: Path, what: str = FORMS) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the columns of each row of ``file``: a line that is not blank, an item, or a record.

    Of an audit's documents those that are to be removed are left out. Raises UserError for what cannot be read, and
    for a row that is no object with ``what``.
    """
    read = _hub if str(file).startswith(HUB) else {".parquet": _parquet, ".json": _array}.get(file.suffix, _lines)
    for number, record in read(file):
        if not isinstance(record, dict):
            raise UserError(f"{file}:{number}: a row is an object with {what}")
        if record.get("keep", True):
            yield number, record


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{number}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number + 1}: not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{file}:{number}: JSON that cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def _array(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open("rb") as stream:
            opening = stream.read(4096).lstrip()[:1]
        rows = json.loads(file.read_text(encoding="utf-8")) if opening == b"[" else None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: JSON that cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    if rows is None:  # JSON Lines by another name
        yield from _lines(file)
    else:
        yield from enumerate(rows, 1)


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        wanted = [name for name in ("id", "keep", "conversation", "messages", "conversations") if name in names]
        wanted += [name for name in ("instruction", "input", "output", "task") if name in names]
        wanted += [name for name in ("prompt", "chosen", "rejected") if name in names]
        for batch in parquet.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}:{number + 1}: not Parquet: {error}") from None


def _hub(source: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    name, _, split = str(source).removeprefix(HUB).partition(":")
    datasets.disable_progress_bars()
    try:
        saved = Path(name).expanduser()
        if saved.is_dir() and ((saved / "state.json").is_file() or (saved / "dataset_dict.json").is_file()):
            loaded = datasets.load_from_disk(str(saved))
            rows = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # no network, no such set, no such split: each has its own class in a library below
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data: {source}: {reason}") from None
    yield from enumerate(rows, 1)


def _form(record: Mapping[str, Any], place: str) -> Form:
    if record.get("conversation") is not None:
        return "text"  # a document, whose messages the audit has written down
    form = looks_like(list(record))
    if form is None:
        raise UserError(f"{place}: a row has {FORMS}; this one has {', '.join(map(str, record)) or 'nothing'}")
    return form


def messages_of(record: Mapping[str, Any], form: Form) -> list[Message]:
    """The messages of a row, which are words alone. Raises SchemaError where it is not of ``form``."""
    if form == "text":
        messages = _written_down(record.get("conversation"))
    else:
        messages = read_exchange(record, form, ExchangeColumns())
        if form != "alpaca":
            _check_words_alone(record.get("messages" if form == "chat" else "conversations") or ())
    if any(HALF_PAIR.search(message.content) for message in messages):
        raise SchemaError("a message with half of a surrogate pair, which is no character: no tokenizer takes it")
    return messages


def _written_down(conversation: Any) -> list[Message]:
    """The messages that an audit wrote into a document."""
    if not conversation:
        raise SchemaError("a document without a conversation: audit the set with form=alpaca, sharegpt or chat")
    try:
        return [Message(role, content) for role, content in json.loads(conversation)]
    except (TypeError, ValueError):
        raise SchemaError(f"'conversation' is not what an audit writes: a row has {FORMS}") from None


def _check_words_alone(turns: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what ``read_exchange`` passes over, as an audit may and training may not."""
    for turn in turns:
        if turn.get("tool_calls"):
            raise SchemaError("a message with tool_calls, which cannot be trained on: write the call as its content")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list) and not all(map(_is_words, content)):
            raise SchemaError("a message with parts that are no text")


def _is_words(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text"
