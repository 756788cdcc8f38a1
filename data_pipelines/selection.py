"""Which documents ``data embed`` is to have in Milvus, and a number that names what each was made from."""

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.collection import ID_BYTES
from workbench.data_version import Version
from workbench.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

SAMPLE = 32
ROW_BYTES = 150


@dataclass(frozen=True)
class Wanted:
    """The chosen documents: content hash by id; bytes of a typical row; the columns they are made from; some texts to
    measure with; the version of the whole data set that they were chosen from; and how many of it have no text."""

    contents: Mapping[str, int]
    row_bytes: int
    columns: list[str]
    sample: list[str] = field(repr=False)
    version: str = ""
    empty: int = 0

    def missing(self, rows: Mapping[str, tuple[int, int]]) -> list[str]:
        """The documents of which not every chunk is among ``rows`` (content hash and chunk count by row id), sorted."""
        there: dict[str, int] = {}
        for row, (content, chunks) in rows.items():
            document = document_of(row)
            if self.contents.get(document) == content:
                there[document] = there.get(document, chunks) - 1
        return sorted(document for document in self.contents if there.get(document) != 0)

    def stale(self, rows: Mapping[str, tuple[int, int]]) -> list[str]:
        """The rows that chosen documents left behind when they were otherwise, sorted."""
        return sorted(
            row for row, (content, _) in rows.items() if self.contents.get(document_of(row), content) != content
        )

    def others(self, rows: Mapping[str, tuple[int, int]]) -> list[str]:
        """The rows of documents that were not chosen, sorted."""
        return sorted(row for row in rows if document_of(row) not in self.contents)


def row_id(document: str, position: int) -> str:
    """The primary key of a chunk."""
    return f"{document}#{position}"


def document_of(row: str) -> str:
    """The document that a chunk is of."""
    return row.rpartition("#")[0]


def open_documents(path: Path, needed: Sequence[str]) -> "ds.Dataset":
    """The Parquet files at ``path``. Raises UserError if they are not Parquet or lack a column."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        dataset = ds.dataset(str(path), format="parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"documents: {path} is not Parquet: {error}") from None
    names = set(dataset.schema.names)
    if lacking := sorted(set(needed) - names):
        raise UserError(f"documents: {path} has no column '{lacking[0]}'; it has {', '.join(sorted(names))}")
    kind = dataset.schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise UserError(f"documents: the column 'text' of {path} holds {kind}, not text")
    return dataset


def select(
    dataset: "ds.Dataset",
    recipe: str,
    *,
    metadata: Sequence[str] = (),
    sources: Sequence[str] = (),
    min_words: int = 0,
    limit: int | None = None,
) -> Wanted:
    """The documents to have: those with ``keep``, a text of enough words and a matching source; of these the ``limit``
    smallest ids. ``recipe`` says how texts become rows.

    Raises UserError if nothing is left, for broken text, or for an id that is given twice or is too long for Milvus.
    """
    import pyarrow as pa

    names = set(dataset.schema.names)
    columns = ["id", "text", *(name for name in ("title", "source") if name in names), *metadata]
    counted = pa.types.is_integer(dataset.schema.field("words").type) if "words" in names else False
    asked = ["id", "text", *(name for name in ("source", "keep") if name in names), *(["words"] if counted else [])]
    patterns = re.compile("|".join(fnmatch.translate(pattern) for pattern in sources))
    chosen: dict[str, int] = {}
    sample: list[str] = []
    characters = empty = 0
    version = Version()
    for batch in dataset.to_batches(columns=list(dict.fromkeys([*columns, *asked]))):
        try:
            rows = batch.select(asked).to_pylist()
            numbers = contents(batch, metadata, recipe)
        except UnicodeDecodeError:
            raise UserError(
                "documents: there is text that is not UTF-8; let 'data audit' read them, it sets such rows aside and "
                "says which"
            ) from None
        version.add([row["id"] for row in rows], [row["text"] for row in rows])
        for row, content in zip(rows, numbers, strict=True):
            words = row["words"] if counted else len((row["text"] or "").split())
            if not row.get("keep", True) or words < min_words or not patterns.match(str(row.get("source") or "")):
                continue
            if not (row["text"] or "").strip():
                empty += 1
                continue
            document = _checked(row["id"])
            if chosen.setdefault(document, content) != content:
                raise UserError(f"documents: the id '{document}' names two documents; give each its own")
            characters += len(row["text"])
            if len(sample) < SAMPLE:
                sample.append(row["text"])
    if not chosen:
        raise UserError("documents: nothing with a text is left after keep, sources and min_words")
    kept = {key: chosen[key] for key in sorted(chosen)[:limit]}
    return Wanted(kept, ROW_BYTES + characters // len(chosen), columns, sample, str(version), empty)


def _checked(given: Any) -> str:
    document = "" if given is None else str(given)
    if not document:
        raise UserError("documents: a document has no id; give each its own, or let 'data audit' make them")
    if len(document.encode()) > ID_BYTES:
        raise UserError(f"documents: the id '{document[:60]}...' has more than {ID_BYTES} bytes")
    return document


def normal_rows(batch: "pa.RecordBatch | pa.Table", metadata: Sequence[str]) -> dict[str, list[str]]:
    """The columns ``id, title, source, text, metadata`` of ``batch`` as strings, the last as JSON; a missing one or a
    null is empty."""
    size = batch.num_rows
    plain = {
        name: ["" if value is None else str(value) for value in batch[name].to_pylist()]
        if name in batch.schema.names
        else [""] * size
        for name in ("id", "title", "source", "text")
    }
    extra = [dict(zip(metadata, values, strict=True)) for values in zip(*(_values(batch[n]) for n in metadata))]  # noqa: B905
    plain["metadata"] = [json.dumps(values, default=str, ensure_ascii=False) for values in extra] or ["{}"] * size
    return plain


def _values(column: "pa.Array | pa.ChunkedArray") -> list[Any]:
    """The values of a column; as text where Python has no type for one, such as a time in the year 30000."""
    try:
        values: list[Any] = column.to_pylist()
    except (OverflowError, ValueError):
        values = column.cast("string").to_pylist()
    return values


def contents(batch: "pa.RecordBatch | pa.Table", metadata: Sequence[str], recipe: str) -> list[int]:
    """A signed 64-bit number for each document that names all that its rows are made from."""
    rows = normal_rows(batch, metadata)
    made = zip(rows["title"], rows["source"], rows["metadata"], rows["text"], strict=True)
    return [
        int.from_bytes(hashlib.blake2b("\0".join((recipe, *of)).encode(), digest_size=8).digest(), "big", signed=True)
        for of in made
    ]
