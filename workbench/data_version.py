"""The version of a data set: a fingerprint of its documents, which runs refer to."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
