"""Documents in files: tables (Parquet, JSON Lines, JSON, CSV), texts (plain, Markdown), web pages and PDFs.

Files are reached through ``pyarrow.fs``: a path on this machine or on NFS, or ``s3://bucket/folder``. What cannot be
read becomes a row with a reason, never an exception.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_pipelines.columns import Columns, readable
from data_pipelines.parsers import Unreadable, html_text, pdf_text
from data_pipelines.sources import Row, is_sound
from workbench.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs as fs

TABLES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
TEXTS = (".txt", ".md", ".markdown", ".rst")
PARSED = (".html", ".htm", ".pdf")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
PART_BYTES = 16_000_000
"""A larger table is read in parts of about this size, so that one file keeps several workers busy."""
LONGEST_LINE = 64_000_000
"""Bytes of a line of JSON; the rest of a longer one is skipped."""
CHECKED_LINES = 100
"""How many lines of JSON tell which columns a file has; one alone may be a bad row."""
CHECKED_FILES = 20
"""How many tables are looked into for their columns before the run begins; a bad one behind them is quarantined."""


@dataclass(frozen=True)
class TextFile:
    """One file of documents, or a part of it; ``name`` is its path below the given folder, ``size`` is in bytes.

    ``part`` is (first, end) of the row groups of Parquet, of the bytes of JSON Lines, None for the whole file; ``line``
    is how many rows or lines stand before it. With a ``reason`` it is known not to be readable.
    """

    filesystem: "fs.FileSystem"
    path: str
    name: str
    size: int
    columns: Columns
    part: tuple[int, int] | None = None
    line: int = 0
    reason: str = ""

    def rows(self) -> Iterator[Row]:
        """Its documents; what cannot be read is a row with a reason."""
        import pyarrow as pa

        if self.reason:
            yield self._bad(self.reason)
            return
        read = READERS.get(kind_of(self.name), TextFile._text)
        try:
            yield from read(self)
        except Unreadable as error:
            yield self._bad(str(error))
        except (OSError, EOFError, pa.ArrowException, MemoryError, RecursionError) as error:
            yield self._bad(f"unreadable file ({type(error).__name__})")

    def _bad(self, reason: str, line: int = 0) -> Row:
        return Row(PurePosixPath(self.name).stem, "", f"{self.name}:{line}" if line else self.name, reason)

    def _stream(self) -> io.BufferedReader:
        """The content, decompressed as the name says."""
        if self.part:
            first, end = self.part
            with self.filesystem.open_input_file(self.path) as file:
                return io.BufferedReader(io.BytesIO(file.read_at(end - first, first)))
        return io.BufferedReader(self.filesystem.open_input_stream(self.path, compression="detect"), 1 << 20)

    def _parquet(self) -> Iterator[Row]:
        import pyarrow.parquet as pq

        line = self.line
        with self.filesystem.open_input_file(self.path) as stream, pq.ParquetFile(stream) as file:
            present = set(file.schema_arrow.names)
            columns = [name for name in self.columns.wanted() if name in present]
            for group in range(*(self.part or (0, file.num_row_groups))):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                    read = lambda start, end, batch=batch: batch.slice(start, end - start).to_pylist()  # noqa: E731
                    for record in readable(read, 0, batch.num_rows):
                        line += 1
                        if isinstance(record, str):
                            yield self._bad(record, line)
                        else:
                            yield self.columns.row(record, f"{self.name}:{line}")

    def _json_lines(self) -> Iterator[Row]:
        with self._stream() as stream:
            for line, content in enumerate(bounded_lines(stream), self.line + 1):
                if content is None:
                    yield self._bad("line is too long", line)
                elif content.strip():
                    yield self._json(content, line)

    def _json(self, content: bytes, line: int) -> Row:
        try:
            record = json.loads(content)
        except UnicodeDecodeError:
            return self._bad("undecodable line", line)
        except (ValueError, RecursionError):
            return self._bad("not a JSON object", line)
        return self._record(record, line)

    def _record(self, record: Any, line: int) -> Row:
        if not isinstance(record, dict):
            return self._bad("not a JSON object", line)
        return self.columns.row(record, f"{self.name}:{line}")

    def _json_array(self) -> Iterator[Row]:
        """A file that is one JSON array of objects; lines of objects under this name are read as such."""
        with self._stream() as stream:
            content = stream.read()
        if not content.lstrip().startswith(b"["):
            for line, part in enumerate(content.splitlines(), 1):
                if part.strip():
                    yield self._json(part, line)
            return
        try:
            records = json.loads(content)
        except UnicodeDecodeError:
            raise Unreadable("undecodable file") from None
        except ValueError:
            raise Unreadable("not a JSON array, perhaps cut off") from None
        for line, record in enumerate(records, 1):
            yield self._record(record, line)

    def _csv(self) -> Iterator[Row]:
        csv.field_size_limit(LONGEST_LINE)
        with io.TextIOWrapper(self._stream(), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            for line, record in csv_records(lines, "\t" if kind_of(self.name) == ".tsv" else ","):
                if isinstance(record, str):
                    yield self._bad(record, line)
                else:
                    yield self.columns.row(record, f"{self.name}:{line}")

    def _text(self) -> Iterator[Row]:
        with self._stream() as stream:
            content = stream.read()
        try:
            yield Row(PurePosixPath(self.name).stem, content.decode("utf-8-sig"), self.name)
        except UnicodeDecodeError:
            raise Unreadable("undecodable file") from None

    def _html(self) -> Iterator[Row]:
        yield self._parsed(html_text)

    def _pdf(self) -> Iterator[Row]:
        yield self._parsed(pdf_text)

    def _parsed(self, parse: Callable[[bytes], tuple[str, str]]) -> Row:
        with self._stream() as stream:
            title, text = parse(stream.read())
        return Row(title or PurePosixPath(self.name).stem, text, self.name)


READERS: dict[str, Callable[[TextFile], Iterator[Row]]] = {
    ".parquet": TextFile._parquet,
    ".jsonl": TextFile._json_lines,
    ".ndjson": TextFile._json_lines,
    ".json": TextFile._json_array,
    ".csv": TextFile._csv,
    ".tsv": TextFile._csv,
    ".html": TextFile._html,
    ".htm": TextFile._html,
    ".pdf": TextFile._pdf,
}


def csv_records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(number of its last line, the record) of each row of CSV; the reason in place of what is no record.

    A quote that is never closed would take all that follows into its field: only its own line is given up.
    """
    again = _Lines(lines)
    header = next(csv.reader(again, delimiter=delimiter), [])
    reader = csv.reader(again, delimiter=delimiter, strict=True)
    while True:
        again.begin()
        try:
            fields = next(reader, None)
        except csv.Error:
            again.put_back_all_but_the_first()
            reader = csv.reader(again, delimiter=delimiter, strict=True)
            yield again.number, "not a row of CSV"
            continue
        if fields is None:
            return
        if len(fields) > len(header):
            yield again.number, "more fields than columns"
        elif len(fields) == len(header):
            yield again.number, dict(zip(header, fields, strict=True))
        elif fields:  # an empty line is no row
            yield again.number, "fewer fields than columns"


class _Lines:
    """Lines of a file that can be read again from the last ``begin`` on; ``number`` counts those read."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self._waiting, self._read = iter(lines), deque[str](), list[str]()
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self._read.append(line)
        self.number += 1
        return line

    def begin(self) -> None:
        self._read = []

    def put_back_all_but_the_first(self) -> None:
        self._waiting.extendleft(reversed(self._read[1:]))
        self.number -= len(self._read[1:])


def kind_of(name: str) -> str:
    """The ending that says how a file is read: ``.jsonl`` of ``a.JSONL.gz``."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def bounded_lines(stream: io.BufferedReader) -> Iterator[bytes | None]:
    """The lines of ``stream``; None for one longer than ``LONGEST_LINE``, which is skipped and not held."""
    while line := stream.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def text_files(source: str | Path, columns: Columns) -> tuple[list[TextFile], tuple[str, ...]]:
    """The files at ``source``, a path or a URL such as ``s3://bucket/folder``, that hold documents, ordered by name,
    and the names of the others.

    Raises UserError if there are none, or if a table lacks one of the columns.
    """
    import pyarrow.fs as fs

    filesystem, path = _filesystem(str(source))
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"source: no such file or folder: {source}")
    alone = info.type != fs.FileType.Directory
    found = [(path, info.size or 0, "")] if info.type == fs.FileType.File else _files_below(filesystem, path)
    root = str(PurePosixPath(path).parent) if alone else path
    kinds = {*TABLES, *TEXTS, *PARSED} | ({".json"} if alone or columns.form != "text" else set())
    files, left_out = [], []
    for place, size, reason in found:
        name = os.fsencode(place[len(root) :].lstrip("/")).decode("utf-8", "backslashreplace")
        if reason or kind_of(name) in kinds:
            files.append(TextFile(filesystem, place, name, size, columns, reason=reason))
        else:
            left_out.append(name)
    if not files:
        raise UserError(f"{source}: no documents here; expected files ending in {', '.join(sorted(kinds))}")
    files.sort(key=lambda file: file.name)
    tables = [file for file in files if kind_of(file.name) in (*TABLES, ".json") and not file.reason]
    for file in tables[:CHECKED_FILES]:
        _check_columns(file, alone=len(files) == 1)
    return [part for file in files for part in parts_of(file)], tuple(sorted(left_out))


def _files_below(filesystem: "fs.FileSystem", folder: str) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, why it cannot be read) of what is below ``folder``; hidden files and folders are passed over."""
    import pyarrow.fs as fs

    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _walk(Path(folder), frozenset())
        return
    for each in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
        hidden = any(part.startswith(".") for part in each.path[len(folder) :].split("/"))
        if each.type == fs.FileType.File and not hidden:
            yield each.path, each.size or 0, ""


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[tuple[str, int, str]]:
    """The same on this machine. Links are followed, but not back into a folder ``above``; Arrow's own listing follows
    them for ever, and knows no path that is not UTF-8."""
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        yield str(folder), 0, f"unreadable folder ({type(error).__name__})"
        return
    above |= {folder.resolve()}
    for path in found:
        try:
            facts = path.stat()
        except OSError as error:  # a link to nowhere
            yield str(path), 0, f"unreadable file ({type(error).__name__})"
            continue
        if stat.S_ISDIR(facts.st_mode):
            if path.resolve() not in above:
                yield from _walk(path, above)
        elif not stat.S_ISREG(facts.st_mode):
            yield str(path), 0, "a pipe, socket or device"
        else:
            yield str(path), facts.st_size, "" if is_sound(str(path)) else "the path is not UTF-8"


def parts_of(file: TextFile) -> list[TextFile]:
    """The parts of a large Parquet file, and of a large file of JSON lines on this machine; of any other the file."""
    import pyarrow as pa
    import pyarrow.fs as fs

    if file.size <= PART_BYTES or file.reason:
        return [file]
    try:
        if kind_of(file.name) == ".parquet":
            return _row_groups(file)
        if file.name.lower().endswith((".jsonl", ".ndjson")) and isinstance(file.filesystem, fs.LocalFileSystem):
            return _line_ranges(file)
    except (OSError, pa.ArrowException):
        pass  # read as a whole, it becomes a row that says so
    return [file]


def _row_groups(file: TextFile) -> list[TextFile]:
    import pyarrow.parquet as pq

    with file.filesystem.open_input_file(file.path) as stream:
        metadata = pq.read_metadata(stream)
    parts, first, line, rows, size = [], 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        size += metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == metadata.num_row_groups - 1:
            parts.append(replace(file, size=size, part=(first, group + 1), line=line))
            first, line, rows, size = group + 1, line + rows, 0, 0
    return parts


def _line_ranges(file: TextFile) -> list[TextFile]:
    parts, first, line = [], 0, 0
    with Path(file.path).open("rb") as stream:
        while block := stream.read(PART_BYTES):
            block += stream.readline(LONGEST_LINE)
            parts.append(replace(file, size=len(block), part=(first, first + len(block)), line=line))
            first, line = first + len(block), line + block.count(b"\n")
    return parts


def _filesystem(source: str) -> "tuple[fs.FileSystem, str]":
    import pyarrow as pa
    import pyarrow.fs as fs

    if "://" not in source:
        return fs.LocalFileSystem(), str(Path(source).absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(source)
        filesystem.get_file_info(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"source: {source} cannot be read: {str(error).splitlines()[0]}") from None
    return filesystem, path


def _keys(lines: Iterable[bytes | None]) -> list[str]:
    """The keys of the objects in some lines of JSON, each once."""
    found: dict[str, None] = {}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(line or b""), dict):
                found |= dict.fromkeys(record)
    return list(found)


def _check_columns(file: TextFile, *, alone: bool) -> None:
    """Raise UserError if the table lacks a column; one that cannot be read is left to be counted, unless ``alone``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = kind_of(file.name)
    present: list[str] = []
    try:
        if kind == ".parquet":
            with file.filesystem.open_input_file(file.path) as stream:
                present = list(pq.read_schema(stream).names)
        else:
            with file._stream() as lines:
                if kind in (".csv", ".tsv"):
                    header = lines.readline(LONGEST_LINE).decode("utf-8-sig")
                    present = next(csv.reader([header], delimiter="\t" if kind == ".tsv" else ","), [])
                elif kind == ".json":
                    return  # the first object of an array is only known when all of it has been read
                else:
                    present = _keys(itertools.islice(bounded_lines(lines), CHECKED_LINES))
    except (OSError, EOFError, pa.ArrowException, ValueError, csv.Error) as error:
        if alone and kind == ".parquet":
            raise UserError(f"{file.path}: not a Parquet file: {error}") from None
        return
    if twice := sorted({name for name in file.columns.needed() if present.count(name) > 1}):
        raise UserError(f"{file.path}: two columns '{twice[0]}'; rename one, or name another")
    if present:
        file.columns.check(present, file.path)
