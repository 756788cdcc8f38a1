"""Rows of a benchmark's collection, with the fields of those that ``data embed`` writes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

SENTENCE = "Each row carries a text, because what a search returns has to be read and sent. "


def filler(characters: int) -> str:
    """A text of this length."""
    return (SENTENCE * (characters // len(SENTENCE) + 1))[:characters]


def made_table(names: Sequence[str], vectors: np.ndarray, texts: Sequence[str]) -> "pa.Table":
    """One row for each document of one chunk."""
    import pyarrow as pa

    count = len(names)
    return pa.table(
        {
            "id": [f"{name}#0" for name in names],
            "document": list(names),
            "position": pa.array([0] * count, pa.int64()),
            "chunks": pa.array([1] * count, pa.int64()),
            "content": pa.array([0] * count, pa.int64()),
            "title": list(names),
            "source": [f"part {number % 10}" for number in range(count)],
            "text": list(texts),
            "metadata": ["{}"] * count,
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(vectors, np.float32).ravel()), vectors.shape[1]
            ),
        }
    )


def row_number(row_id: str) -> int:
    """The number of the row whose document was named by it."""
    return int(row_id.rpartition("#")[0])
