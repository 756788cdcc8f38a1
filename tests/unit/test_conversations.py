"""Rows to fine-tune on: every form is read alike, and what is no row is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench.errors import UserError
from workloads.conversations import Conversation, conversations, read_conversations, records, write_conversations

ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Add.\n\n1 1"}, {"from": "gpt", "value": "2"}]}
CHAT = {"messages": [{"role": "user", "content": "Add.\n\n1 1"}, {"role": "assistant", "content": "2"}]}
DOCUMENT = {"id": "d1", "text": "Add.", "conversation": json.dumps([["user", "Add.\n\n1 1"], ["assistant", "2"]])}


def jsonl(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def turns(row: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, CHAT, DOCUMENT], ids=["alpaca", "sharegpt", "chat", "document"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_form_in_every_format_is_the_same_conversation(tmp_path: Path, row: Any, suffix: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    elif suffix == "json":
        file.write_text(json.dumps([row], indent=1))
    else:
        jsonl(file, row)
    (read,) = conversations([file])
    assert turns(read) == [("user", "Add.\n\n1 1"), ("assistant", "2")]
    assert read.source == row.get("id", f"{file.name}:1")


def test_a_data_set_by_name_is_read_row_by_row(tmp_path: Path) -> None:
    import datasets

    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list([CHAT, CHAT])}).save_to_disk(saved)
    rows = list(conversations([Path(f"hf:{saved}:test")]))
    assert [turns(row)[1] for row in rows] == [("assistant", "2")] * 2
    assert rows[1].source == "saved:test:2"
    with pytest.raises(UserError, match=f"data: hf:{saved}: 'train'"):
        list(conversations([Path(f"hf:{saved}")]))


def test_each_file_of_a_folder_has_its_own_form(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ALPACA)
    jsonl(tmp_path / "b.jsonl", CHAT, CHAT)
    assert len(list(conversations([tmp_path]))) == 3


def test_documents_that_an_audit_would_remove_are_left_out(tmp_path: Path) -> None:
    rows = [{**DOCUMENT, "id": str(i), "keep": i != 1} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet")
    assert [row.source for row in conversations([tmp_path])] == ["0", "2"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"instruction": "x"}, "output is missing"),
        ({"instruction": "x", "output": 3}, "output is no text but a number"),
        ({"messages": []}, "instruction is missing"),
        ({"instruction": "x", "output": "\ud800"}, "a message with half of a surrogate pair"),
        ([1], "a row is an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, second: Any, message: str) -> None:
    file = jsonl(tmp_path / "rows.jsonl", ALPACA, second)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {message}"):
        list(conversations([file]))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "tool_calls"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "no text"),
        ({"role": "assistant", "content": ["2"]}, "no text"),
        ({"role": "wizard", "content": "2"}, "unknown role"),
    ],
)
def test_what_would_be_lost_in_training_is_refused(tmp_path: Path, turn: Any, message: str) -> None:
    file = jsonl(tmp_path / "rows.jsonl", {"messages": [CHAT["messages"][0], turn]})
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{message}"):
        list(conversations([file]))


def test_parts_of_a_sharegpt_turn_that_are_no_text_are_refused(tmp_path: Path) -> None:
    seen = {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    file = jsonl(tmp_path / "rows.jsonl", {"conversations": [seen, {"from": "gpt", "value": "2"}]})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*no text"):
        list(conversations([file]))


@pytest.mark.parametrize("written", [CHAT["messages"], "Hello.", "[1, 2]", "5"])
def test_a_conversation_that_no_audit_wrote_is_named_by_file_and_line(tmp_path: Path, written: Any) -> None:
    file = jsonl(tmp_path / "rows.jsonl", {"conversation": written})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'conversation' is not what an audit writes"):
        list(conversations([file]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"instruction": "\xe9"}]', r"a\.json:2: not UTF-8"),
        ("b.json", b"[" * 100_000, r"b\.json: JSON that cannot be read"),
        ("c.jsonl", b'{}\n{"id": ' + b"1" * 5000 + b"}", r"c\.jsonl:2: JSON that cannot be read"),
        ("d.jsonl", b"[" * 100_000, r"d\.jsonl:1: JSON that cannot be read"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(records(file))


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.jsonl", "{", r"a\.jsonl:1: not JSON"),
        ("b.jsonl", "\n\n", "no rows in"),
        ("c.jsonl", '{"text": "hello"}', "this one has text"),
        ("d.json", '[\n{"a": 1},\n', r"d\.json:3: not JSON"),
        ("e.parquet", "no", "not Parquet"),
    ):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            list(conversations([file]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.parquet file"):
        list(conversations([tmp_path / "empty"]))


def test_what_is_written_is_read_in_parts_that_share_no_row(tmp_path: Path) -> None:
    rows = list(conversations([jsonl(tmp_path / "in.jsonl", *[ALPACA] * 9)]))
    file = tmp_path / "out.jsonl"
    write_conversations(rows, file)
    assert list(read_conversations(file)) == rows == list(conversations([file]))
    lines = file.read_bytes().splitlines(keepends=True)
    middle = sum(map(len, lines[:4]))
    assert list(read_conversations(file, 0, middle)) == rows[:4]
    assert list(read_conversations(file, middle)) == rows[4:]
