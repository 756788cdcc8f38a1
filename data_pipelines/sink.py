"""Chunks with vectors into Milvus: a Ray Data sink that any pipeline may end with.

    dataset.write_datasink(MilvusDatasink(uri, Collection("documents", "all-MiniLM-L6-v2")), ...)

Every row has a deterministic primary key and every write is an upsert, so a write task that Ray makes again leaves the
same rows. A server is written by every task, a Milvus Lite folder through its one owner.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from data_pipelines.collection import Collection
from data_pipelines.owner import ask, hold
from data_pipelines.store import Store, is_server

COLUMNS = ("id", "document", "position", "chunks", "content", "title", "source", "text", "metadata", "vector")


class MilvusDatasink(Datasink[int]):
    """Upserts blocks with the columns ``COLUMNS`` into ``collection`` (its dimension is that of the first vectors).

    ``progress`` is a ``Progress`` actor that is told of what Milvus has taken. A write that a server does not take is
    made again for ``patience`` seconds.
    """

    def __init__(
        self, uri: str, collection: Collection, token: str = "", *, patience: float = 0, progress: Any = None
    ) -> None:
        self._uri, self._token, self._collection = uri, token, collection
        self._patience, self._progress = patience, progress
        self._owner = None if is_server(uri) else hold(uri)

    def get_name(self) -> str:
        return "Milvus"

    def write(self, blocks: Iterable[Block], ctx: Any) -> int:
        """Upsert ``blocks``; how many rows Milvus has taken. Raises Failure if it does not take them."""
        written = 0
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            if not table.num_rows:
                continue
            table = table.select(COLUMNS)
            collection = replace(self._collection, dimension=table.schema.field("vector").type.list_size)
            if self._owner is not None:
                written += ask(self._owner.upsert.remote(collection, table))
            else:
                written += _store(self._uri, self._token, self._patience).upsert(collection, table)
            if self._progress is not None:
                ray.get(self._progress.add.remote(documents=documents_ended(table)))  # the last one, too, is counted
        return written


@functools.lru_cache(maxsize=1)
def _store(uri: str, token: str, patience: float) -> Store:
    """The server that this process writes to, which the tasks after the first find open."""
    return Store(uri, token, wait=patience, patience=patience)


def documents_ended(table: pa.Table) -> int:
    """How many documents have their last chunk in ``table``."""
    return sum(
        position + 1 == chunks
        for position, chunks in zip(table["position"].to_pylist(), table["chunks"].to_pylist(), strict=True)
    )


@ray.remote(num_cpus=0)
class Progress:
    """Counts of named things, added to by tasks and asked for by the driver."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        """Add to the counts."""
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count

    def counts(self) -> dict[str, int]:
        """The counts so far."""
        return dict(self._counts)
