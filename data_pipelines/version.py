"""The version of a data set: a fingerprint of its documents, which runs refer to."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UserError

if TYPE_CHECKING:
    import pyarrow.dataset as ds


class Version:
    """16 hex digits that name a set of documents by their ids and texts, in whichever files and order they lie."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Take some of the documents."""
        for name, text in zip(ids, texts, strict=True):
            own = hashlib.blake2b(f"{name}\0{text}".encode(), digest_size=16).digest()
            self._total += int.from_bytes(own, "big")

    def __str__(self) -> str:
        return f"{self._total % (1 << 128):032x}"[:16]


def version_of(documents: "ds.Dataset") -> str:
    """The version of the documents that an audit or a filter wrote."""
    version = Version()
    for batch in documents.to_batches(columns=["id", "text"]):
        version.add(batch["id"].to_pylist(), batch["text"].to_pylist())
    return str(version)


def open_audit(path: Path) -> "ds.Dataset":
    """The documents of a run of an audit or a filter, or of the folder that holds them. Raises UserError if there are
    none."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    folder = path / "artifacts" / "documents" if (path / "artifacts").is_dir() else path
    try:
        documents = ds.dataset(str(folder), format="parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder} is not Parquet: {error}") from None
    if missing := [name for name in ("id", "text", "keep", "split") if name not in documents.schema.names]:
        raise UserError(f"{folder} was not written by 'data audit': it has no column '{missing[0]}'")
    return documents
