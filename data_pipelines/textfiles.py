"""Documents in the user's own files: Parquet and JSON Lines with a text column, or a folder of text files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.sources import Row
from workbench.errors import UserError

TABLES = {".parquet", ".jsonl", ".ndjson"}
TEXTS = {".txt", ".md", ".rst"}


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold a document's text, title and source; the last two may be empty."""

    text: str = "text"
    title: str = ""
    source: str = ""

    def wanted(self) -> list[str]:
        """The column names that are set, each once."""
        return list(dict.fromkeys(filter(None, (self.text, self.title, self.source))))


@dataclass(frozen=True)
class TextFile:
    """One file of documents; ``name`` is its path below the given folder, ``size`` is in bytes."""

    path: str
    name: str
    size: int
    columns: Columns

    def rows(self) -> Iterator[Row]:
        """Its documents; what cannot be read is a row with a reason."""
        suffix = Path(self.path).suffix
        if suffix == ".parquet":
            yield from self._parquet()
        elif suffix in TABLES:
            yield from self._json_lines()
        else:
            yield from self._text()

    def _parquet(self) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        line = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024, columns=self.columns.wanted()):
                    for record in batch.to_pylist():
                        line += 1
                        yield self._row(record, line)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            yield self.name, "", f"{self.name}:{line + 1}", f"unreadable file ({type(error).__name__})"

    def _json_lines(self) -> Iterator[Row]:
        with Path(self.path).open("rb") as stream:
            for line, content in enumerate(stream, 1):
                if not content.strip():
                    continue
                try:
                    record = json.loads(content)
                except UnicodeDecodeError:
                    yield self.name, "", f"{self.name}:{line}", "undecodable line"
                    continue
                except ValueError:
                    yield self.name, "", f"{self.name}:{line}", "not a JSON object"
                    continue
                if isinstance(record, dict):
                    yield self._row(record, line)
                else:
                    yield self.name, "", f"{self.name}:{line}", "not a JSON object"

    def _text(self) -> Iterator[Row]:
        try:
            yield Path(self.path).stem, Path(self.path).read_text(encoding="utf-8"), self.name, ""
        except UnicodeDecodeError:
            yield Path(self.path).stem, "", self.name, "undecodable file"

    def _row(self, record: dict[str, object], line: int) -> Row:
        place = f"{self.name}:{line}"
        text = record.get(self.columns.text)
        title = str(record.get(self.columns.title) or place)
        source = str(record.get(self.columns.source) or place)
        return (title, text, source, "") if isinstance(text, str) else (title, "", source, "text is missing")


def text_files(path: Path, columns: Columns) -> list[TextFile]:
    """The files at ``path`` that hold documents, ordered by name.

    Raises UserError if there are none, or if a table lacks one of ``columns``.
    """
    root = path if path.is_dir() else path.parent
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    known = sorted(p for p in found if p.suffix in TABLES | TEXTS)
    if not known:
        raise UserError(f"{path}: no documents here; expected files ending in {', '.join(sorted(TABLES | TEXTS))}")
    for file in known:
        _check_columns(file, columns)
    return [TextFile(str(p), p.relative_to(root).as_posix(), p.stat().st_size, columns) for p in known]


def _check_columns(file: Path, columns: Columns) -> None:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            present = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: not a Parquet file: {error}") from None
    elif file.suffix in TABLES:
        with file.open("rb") as stream:
            try:
                first = json.loads(stream.readline() or b"{}")
            except ValueError:
                return  # a bad row, to be counted as one
        present = list(first) if isinstance(first, dict) else []
    else:
        return
    missing = [column for column in columns.wanted() if column not in present]
    if missing and present:
        raise UserError(
            f"{file}: no column '{missing[0]}'; it has {', '.join(present)}: name one with text_column=NAME"
        )
