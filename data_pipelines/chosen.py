"""Chosen rows of Parquet files as a Ray Data source that needs no CPU of its own.

``ray.data.read_parquet`` lists files in a task of one CPU that cannot be told otherwise. Where a pool of workers holds
every CPU, that task waits for the workers, and they for it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from ray import ObjectRef, get
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

READ_ROWS = 4096


class ChosenRows(Datasource):
    """The ``columns`` of those rows of ``files`` whose ``id`` is among ``ids``, a sorted array; one task a file.

    ``shared`` says that every node sees the same files; otherwise only the driver's node reads.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str], ids: ObjectRef, *, shared: bool) -> None:
        super().__init__()
        self._files = list(files)
        self._columns = list(columns)
        self._ids = ids
        self._shared = shared

    @property
    def tasks(self) -> int:
        """How many read tasks there are."""
        return len(self._files)

    @property
    def supports_distributed_reads(self) -> bool:
        return self._shared

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(Path(file).stat().st_size for file in self._files)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        columns, ids = self._columns, self._ids
        tasks = []
        for file in self._files:
            size = Path(file).stat().st_size
            metadata = BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=(file,))
            read = lambda file=file: read_rows(file, columns, get(ids))  # noqa: E731
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def read_rows(file: str, columns: list[str], ids: np.ndarray) -> Iterator[pa.Table]:
    """The chosen rows of one file, some thousands read at a time."""
    found = False
    for batch in ds.dataset(file, format="parquet").to_batches(columns=columns, batch_size=READ_ROWS):
        rows = keep_ids(pa.Table.from_batches([batch]), ids)
        if rows.num_rows:
            found = True
            yield rows
    if not found:
        yield keep_ids(ds.dataset(file, format="parquet").schema.empty_table().select(columns), ids)


def keep_ids(rows: pa.Table, ids: np.ndarray) -> pa.Table:
    """The rows whose id is among the sorted ``ids``."""
    own = np.array([str(key) for key in rows["id"].to_pylist()], dtype=str)
    place = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
    return rows.filter(pa.array(ids[place] == own, pa.bool_()))
