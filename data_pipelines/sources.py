"""A Ray Data source of documents: items that read as rows, several items a task.

    source = DocumentSource(split_evenly(items, 64), shared=False)
    ds = ray.data.read_datasource(source, override_num_blocks=source.tasks)

An item is a module, a file or a part of a table: it has a ``size`` in bytes and yields rows. A row with a ``reason`` is
something that could not be read and says why; every other row is one document.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BLOCK = 2048
BLOCK_CHARACTERS = 32_000_000
"""A block is closed early from this many characters on: memory follows the text, not the number of rows."""


class Row(NamedTuple):
    """One document, or the ``reason`` why there is none: ``key`` is the id that the source gives, empty for none, and
    ``conversation`` its messages as JSON, empty for plain text."""

    title: str
    text: str
    source: str
    reason: str = ""
    key: str = ""
    conversation: str = ""


def is_sound(text: str) -> bool:
    """Whether ``text`` can be encoded: no lone surrogate is in it, as escaped in JSON or for an undecodable byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


COLUMNS = (*Row._fields, "split")


class Item(Protocol):
    """Something on disk that holds documents."""

    @property
    def size(self) -> int:
        """Bytes on disk."""

    def rows(self) -> Iterator[Row]:
        """Its documents, in the order they have there."""


class DocumentSource(Datasource):
    """Reads ``groups`` of items with one task a group.

    Ask Ray for exactly ``tasks`` blocks: for more it splits each block in two and no longer fuses the read with the
    map after it. ``shared`` says that every node sees the same files; otherwise only the driver's node reads.
    ``split`` is written into every row.
    """

    def __init__(self, groups: Sequence[Sequence[Item]], *, shared: bool, split: str = "") -> None:
        super().__init__()
        self._groups = groups
        self._split = split
        self._shared = shared

    @property
    def tasks(self) -> int:
        """How many read tasks there are."""
        return len(self._groups)

    @property
    def supports_distributed_reads(self) -> bool:
        return self._shared

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(item.size for group in self._groups for item in group)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        tasks = []
        for group in self._groups:
            size = sum(item.size for item in group)
            metadata = BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=None)
            tasks.append(ReadTask(_reader(group, self._split), metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _reader(group: Sequence[Item], split: str) -> Any:
    return lambda: read_blocks(group, split)


def split_evenly(items: Sequence[Item], groups: int) -> list[list[Item]]:
    """At most ``groups`` runs of neighbouring items of about equally many bytes, none of them empty."""
    total = sum(item.size + 1 for item in items)
    split: list[list[Item]] = [[] for _ in range(max(1, groups))]
    seen = 0
    for item in items:
        split[seen * len(split) // total].append(item)
        seen += item.size + 1
    return [group for group in split if group]


def read_blocks(items: Iterable[Item], split: str = "") -> "Iterator[pa.Table]":
    """The rows of ``items`` as Arrow tables of ``COLUMNS`` with about ``ROWS_PER_BLOCK`` rows each."""
    rows: list[Row] = []
    characters = 0
    for item in items:
        for row in item.rows():
            rows.append(row)
            characters += len(row.text)
            if len(rows) >= ROWS_PER_BLOCK or characters >= BLOCK_CHARACTERS:
                yield _table(rows, split)
                rows, characters = [], 0
    yield _table(rows, split)


def _table(rows: list[Row], split: str) -> "pa.Table":
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) if rows else [()] * len(Row._fields)
    # A lone surrogate is legal in a docstring and in no encoding: it is replaced, so that the row can be written.
    arrays = [pa.array([value.encode("utf-8", "replace").decode() for value in c], pa.string()) for c in columns]
    return pa.table([*arrays, pa.array([split] * len(rows), pa.string())], names=list(COLUMNS))


def quiet_progress() -> None:
    """Keep Ray Data's own bars and log lines off the terminal: a run says itself what it has found."""
    import logging

    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # tells that the bars are off
