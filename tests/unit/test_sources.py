"""Each kind of source gives its documents, and each way of being broken gives a row with a reason."""

import gzip
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import textfiles
from data_pipelines.columns import Columns
from data_pipelines.parsers import Unreadable, html_text, pdf_text
from data_pipelines.reading import Reading, open_reading
from data_pipelines.sources import Row
from data_pipelines.textfiles import text_files
from workbench.conversations import ExchangeColumns, Form, SchemaError, looks_like, read_exchange
from workbench.errors import UserError
from workbench.files import fingerprint

PDF = (
    "<< /Type /Catalog /Pages 2 0 R >>",
    "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
    "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Contents 4 0 R /Resources << /Font << /F1 "
    "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
    "<< /Length {length} >>\nstream\n{content}\nendstream",
    "<< /Title (On ducks) >>",
)


def pdf(words: str) -> bytes:
    """A page with ``words`` on it."""
    content = f"BT /F1 12 Tf 10 50 Td ({words}) Tj ET" if words else ""
    file, places = "%PDF-1.4\n", []
    for number, part in enumerate(PDF, 1):
        places.append(len(file))
        part = part.replace("{length}", str(len(content))).replace("{content}", content)
        file += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"trailer\n<< /Root 1 0 R /Info 5 0 R /Size 6 >>\nstartxref\n{len(file)}\n%%EOF"
    return f"{file}xref\n0 6\n0000000000 65535 f \n{table}{trailer}".encode()


def rows(path: Path, columns: Columns | None = None) -> list[Row]:
    return [row for file in text_files(path, columns or Columns())[0] for row in file.rows()]


def test_a_folder_of_everything(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "a.txt").write_text("Plain.")
    (tmp_path / "sub" / "b.md").write_text("# Marked")
    (tmp_path / "c.html").write_text("<title>A page</title><p>One <b>bold</b> word</p><script>x()</script>")
    (tmp_path / "d.pdf").write_bytes(pdf("Ducks swim"))
    (tmp_path / "e.csv").write_text('text,n\n"two\nlines",1\n')
    (tmp_path / "f.tsv").write_text("text\tn\ntabs\t1\n")
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    pq.write_table(pa.table({"text": ["in columns"]}), tmp_path / "h.parquet")
    found = {row.source: (row.title, row.text, row.reason) for row in rows(tmp_path)}
    assert found == {
        "a.txt": ("a", "Plain.", ""),
        "c.html": ("A page", "One bold word", ""),
        "d.pdf": ("On ducks", "Ducks swim", ""),
        "e.csv:3": ("e.csv:3", "two\nlines", ""),
        "f.tsv:2": ("f.tsv:2", "tabs", ""),
        "g.jsonl.gz:1": ("g.jsonl.gz:1", "packed", ""),
        "h.parquet:1": ("h.parquet:1", "in columns", ""),
        "sub/b.md": ("b", "# Marked", ""),
    }


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        ("a.csv", b"text,n\nright,1\nshort\nlong,1,2\nbr\xffken,1\nright,2\n",
         ["", "fewer fields than columns", "more fields than columns", "undecodable row", ""]),
        ("a.csv", b'text,n\nright,1\n"open,1\nright,2\n"two\nlines",3\n"open,4\n',
         ["", "not a row of CSV", "", "", "not a row of CSV"]),
        ("a.csv", b'text,n\na,\n,\n\n"q"x,1\nright,1\n', ["", "", "not a row of CSV", ""]),
        ("a.csv", b"text,n\nright,br\xffken and unused\n", [""]),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n{"text": "\\ud83e\\udd86"}', ["undecodable row", ""]),
        ("a.jsonl", b'{"other": 1}\n[]\n{"text": "right"}', ["text is missing", "not a JSON object", ""]),
        ("a.jsonl", b'{"text": "right"}\n{"text": null}\n{"text": 5}\n[1]\n{"te\n{"text": "\xff"}\n{"text": "cut',
         ["", "text is missing", "text is no text but int", "not a JSON object", "not a JSON object",
          "undecodable line", "not a JSON object"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "right"}\n' * 9, mtime=0)[:-12], ["unreadable file (OSError)"]),
        ("a.json", b'[{"text": "right"}, 3', ["not a JSON array, perhaps cut off"]),
        ("a.json", b'[{"text": "right"}, 3]', ["", "not a JSON object"]),
        ("a.txt", b"caf\xe9", ["undecodable file"]),
        ("a.pdf", b"%PDF-1.4 and no more", ["unreadable file (PdfStreamError)"]),
        ("a.pdf", pdf(""), ["no text in it, perhaps a scan"]),
        ("a.html", b"<meta charset=nonsense><p>x", ["unknown encoding"]),
        ("a.html", b"<p>caf\xe9", ["undecodable file"]),
        ("a.html", b'<meta charset="undefined"><p>x', ["undecodable file"]),
        ("a.html", b"<meta charset=punycode><p>-x\xe9", ["undecodable file"]),
    ],
)  # fmt: skip
def test_what_is_broken_has_a_reason(name: str, content: bytes, reasons: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row.reason for row in rows(tmp_path / name)] == reasons


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_large_table_is_read_in_parts(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Document {i} of them.\u2028" for i in range(1000)]
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=90)
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    whole = rows(tmp_path)
    monkeypatch.setattr(textfiles, "PART_BYTES", 2000)
    parts, _ = text_files(tmp_path, Columns())
    assert len(parts) > 5
    assert [row for part in parts for row in part.rows()] == whole
    assert [row.source for row in whole] == [f"a.{suffix}:{i}" for i in range(1, 1001)]


def test_a_truncated_parquet_file_among_others_stops_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["whole"] * 3}), tmp_path / "b.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    assert [row.reason for row in rows(tmp_path)] == ["unreadable file (ArrowInvalid)", "", "", ""]


def test_broken_text_in_parquet_loses_its_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"two", b"br\xffken", b"four"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert [row.text or row.reason for row in rows(tmp_path)] == ["one", "two", "undecodable row", "four"]


def test_a_time_that_python_has_no_type_for_loses_its_row_alone(tmp_path: Path) -> None:
    when = pa.array([0, 2**60, 1], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["one", "two", "three"], "when": when}), tmp_path / "a.parquet")
    found = rows(tmp_path, Columns(source="when"))
    assert [row.text or row.reason for row in found] == ["one", "a number or time out of range", "three"]


def test_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.docx", "c.json", ".hidden"):
        (tmp_path / name).write_text("[]")
    files, left_out = text_files(tmp_path, Columns())
    assert ([file.name for file in files], left_out) == (["a.txt"], ("b.docx", "c.json"))


def test_links_pipes_and_odd_names_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("words")
    (tmp_path / "sub" / "self").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to("sub")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")).write_text("words")
    assert {row.source: row.text or row.reason for row in rows(tmp_path)} == {
        "bad\\xff.txt": "the path is not UTF-8",
        "gone.txt": "unreadable file (FileNotFoundError)",
        "linked/a.txt": "words",
        "pipe.txt": "a pipe, socket or device",
        "round.txt": "unreadable file (OSError)",
        "sub/a.txt": "words",
    }
    assert fingerprint(tmp_path)


def test_a_line_too_long_is_skipped_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "a"}', '{"text": "' + "x" * 999 + '"}', '{"text": "b"}']))
    assert [row.text or row.reason for row in rows(tmp_path)] == ["a", "line is too long", "b"]


def test_the_column_mapping(tmp_path: Path) -> None:
    table = {"body": ["words"], "name": ["T"], "from": ["S"], "key": [7]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    columns = Columns("body", "name", "from", "key")
    assert rows(tmp_path, columns) == [Row("T", "words", "S", "", "7")]
    with pytest.raises(UserError, match="no column 'text'; it has body, name, from, key: name one with text_column"):
        rows(tmp_path)
    with pytest.raises(UserError, match="name one with id_column"):
        rows(tmp_path, Columns("body", id="nr"))
    ids = [columns.row({"body": "x", "key": key}, "p").reason for key in (None, "", "x" * 129, "x\0", "x")]
    assert ids == ["id is missing", "id is missing", "id is longer than 128 bytes", "id has a NUL character", ""]


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}
CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Add."}]}, {"role": "assistant", "content": "3"}]
}


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("alpaca", ALPACA, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
        ("alpaca", ALPACA | {"input": ""}, [("user", "Add."), ("assistant", "3")]),
        ("sharegpt", SHAREGPT, [("user", "Add."), ("assistant", "3")]),
        ("chat", CHAT, [("user", "Add."), ("assistant", "3")]),
    ],
)
def test_exchanges_of_each_form(form: Form, record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert looks_like(list(record)) == form
    messages = read_exchange(record, form, ExchangeColumns())
    assert [(message.role, message.content) for message in messages] == expected


@pytest.mark.parametrize(
    ("form", "record", "reason"),
    [
        ("alpaca", {"instruction": "Add."}, "output is missing"),
        ("alpaca", {"instruction": " ", "output": "3"}, "instruction is empty"),
        ("alpaca", {"instruction": "Add.", "output": 3}, "output is no text but a number"),
        ("sharegpt", {"conversations": "x"}, "conversations is no list of messages"),
        ("sharegpt", {"conversations": [{"from": "cat", "value": "x"}]}, "a message has an unknown role"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ("chat", {"messages": [{"role": "user", "content": "x"}] * 2 + [{"role": "assistant", "content": "y"}]},
         "two questions in a row"),
        ("chat", {"messages": [{"content": "x"}]}, "a message has no 'role'"),
    ],
)  # fmt: skip
def test_schema_errors(form: Form, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        read_exchange(record, form, ExchangeColumns())
    row = Columns(form=form).row(record, "p")
    assert (row.reason, row.text) == (f"schema: {reason}", "")


def test_an_instruction_set_in_one_json_array(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps([ALPACA, {"instruction": "x"}]))
    first, second = rows(tmp_path, Columns(form="alpaca"))
    assert (first.text, json.loads(first.conversation)[1]) == ("Add.\n\n1 2\n\n3", ["assistant", "3"])
    assert second.reason == "schema: output is missing"


def test_html_keeps_blocks_apart_and_leaves_navigation_out() -> None:
    page = "<body><nav>Menu</nav><main><h1>Title</h1><ul><li>one<li>two</ul><p>a <i>b</i>c</p></main><footer>f</footer>"
    assert html_text(page.encode()) == ("", "Title\none\ntwo\na bc")
    assert html_text("<title>ä</title>ö".encode("utf-16")) == ("ä", "ö")
    assert html_text("<meta charset='latin-1'><p>é".encode("latin-1"))[1] == "é"
    assert html_text("<meta charset=UTF-16LE><p>plain é".encode())[1] == "plain é"


def test_an_encrypted_pdf_says_so(tmp_path: Path) -> None:
    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    with pytest.raises(Unreadable, match="encrypted file"):
        pdf_text((tmp_path / "a.pdf").read_bytes())


def read_all(reading: Reading) -> list[Row]:
    return [row for item in open_reading(reading).items for row in item.rows()]


def test_a_database_by_table_and_by_query(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("CREATE TABLE pages (id INTEGER, text TEXT)")
        database.executemany("INSERT INTO pages VALUES (?, ?)", [(1, "one"), (2, None), (3, "three")])
        database.commit()
    url = f"sqlite:///{tmp_path / 'a.db'}"
    found = read_all(Reading(source=url, query="pages", id_column="id"))
    assert [(row.key, row.text, row.reason) for row in found] == [
        ("1", "one", ""), ("2", "", "text is missing"), ("3", "three", "")
    ]  # fmt: skip
    assert len(read_all(Reading(source=url, query="SELECT text FROM pages WHERE id > 2"))) == 1
    assert len(read_all(Reading(source=url, query="main.pages"))) == 3
    assert [row.text for row in read_all(Reading(source=url, query="SELECT ':x 9%' AS text"))] == [":x 9%"]
    for reading, message in [
        (Reading(source=url, query="leaves"), "no such table"),
        (Reading(source=url), "say what to read"),
        (Reading(source=url, query="SELECT id FROM pages"), "no column 'text'"),
        (Reading(source="sqlite:////nowhere.db", query="x"), "no such SQLite file"),
        (Reading(source="nosuch://host/db", query="x"), "not a database URL that SQLAlchemy knows"),
        (Reading(source="postgresql://u:pw@host:notaport/db", query="x"), "the port in the database URL is no number"),
        (Reading(source="postgresql://u:p@ss:hidden@host/db", query="x"), "in a password write %40 for @"),
        (Reading(source="mysql+pymysql://u:hidden@host/db", query="x"), "pip install pymysql"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            open_reading(reading)
        assert "hidden" not in str(raised.value)


def test_broken_text_in_sqlite_loses_its_row_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("CREATE TABLE pages (text TEXT)")
        database.executemany("INSERT INTO pages VALUES (CAST(? AS TEXT))", [(b"one",), (b"br\xff",), (b"three",)])
        database.commit()
    found = read_all(Reading(source=f"sqlite:///{tmp_path / 'a.db'}", query="pages"))
    assert [row.text or row.reason for row in found] == ["one", "undecodable row", "three"]


def test_a_hugging_face_data_set_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    sets = {"train": ["a", "b", None], "test": ["c"]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in sets.items()})
    made.save_to_disk(str(tmp_path / "set"))
    monkeypatch.setattr("data_pipelines.hub.ROWS_AN_ITEM", 2)
    found = read_all(Reading(source=f"hf:{tmp_path / 'set'}"))
    assert [row.text or row.reason for row in found] == ["a", "b", "text is missing"]
    assert [row.text for row in read_all(Reading(source=f"hf:{tmp_path / 'set'}", split="test"))] == ["c"]
    with pytest.raises(UserError, match="hf:"):
        open_reading(Reading(source=f"hf:{tmp_path / 'set'}", split="nowhere"))


def test_broken_text_in_a_hugging_face_data_set_loses_its_row_alone(tmp_path: Path) -> None:
    import datasets

    texts = [b"whole"] * 302 + [b"br\xffken"] + [b"whole"] * 501
    table = pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "set"))
    found = read_all(Reading(source=f"hf:{tmp_path / 'set'}"))
    assert [row.source.rpartition(":")[2] for row in found] == [str(line) for line in range(1, 805)]
    assert {line: row.reason for line, row in enumerate(found) if row.reason} == {302: "undecodable row"}


OBJECTS = {"docs/a.txt": b"From a bucket.", "docs/b.jsonl": b'{"text": "Line one"}\n{"text": "Line two"}\n'}


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as listing and reading take, with no regard for who asks."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.removeprefix("/bucket/").removeprefix("/bucket")
        if name in OBJECTS:
            content, status = OBJECTS[name], 200
            if span := self.headers.get("Range"):
                first, _, last = span.removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last or len(content)) + 1], 206
            self._answer(status, content, "application/octet-stream")
        elif "list-type=2" in query:
            keys = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(value)}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key, value in OBJECTS.items()
            )
            body = f"<ListBucketResult><Name>bucket</Name><KeyCount>2</KeyCount>{keys}</ListBucketResult>"
            self._answer(200, body.encode(), "application/xml")
        else:
            self._answer(404, b"", "application/xml")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def bucket() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"s3://key:hidden@bucket/docs?scheme=http&endpoint_override=127.0.0.1:{server.server_port}&region=eu-north-1"
    server.shutdown()
    server.server_close()


def test_a_bucket(bucket: str) -> None:
    opened = open_reading(Reading(source=bucket))
    assert opened.shared
    assert "hidden" not in str(opened.facts)
    found = [(row.source, row.text) for item in opened.items for row in item.rows()]
    assert found == [("a.txt", "From a bucket."), ("b.jsonl:1", "Line one"), ("b.jsonl:2", "Line two")]
