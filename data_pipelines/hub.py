"""Data sets of the Hugging Face hub (``source: hf:squad``) or in a folder that ``datasets`` wrote (``hf:/squad``)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.columns import Columns, readable
from data_pipelines.sources import Row
from workbench.errors import UserError

PREFIX = "hf:"
ROWS_AN_ITEM = 20_000
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class HubRows:
    """Rows ``first`` to ``end`` of one split of a data set, read from the local cache."""

    name: str
    subset: str
    split: str
    first: int
    end: int
    size: int
    columns: Columns

    def rows(self) -> Iterator[Row]:
        """Its documents, in the order of the data set; what cannot be read is a row with a reason."""
        import pyarrow as pa

        line = self.first
        try:
            dataset = load(self.name, self.subset, self.split)
            wanted = [name for name in self.columns.wanted() if name in dataset.column_names]
            chosen = dataset.select_columns(wanted)

            def read(first: int, end: int) -> list[dict[str, Any]]:
                batch = chosen[first:end]
                return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

            for start in range(self.first, self.end, ROWS_AT_ONCE):
                for record in readable(read, start, min(start + ROWS_AT_ONCE, self.end)):
                    line += 1
                    place = f"{self.name}/{self.split}:{line}"
                    if isinstance(record, str):
                        yield Row(self.name, "", place, record)
                    else:
                        yield self.columns.row(record, place)
        except (OSError, ValueError, pa.ArrowException) as error:
            place = f"{self.name}/{self.split}:{line + 1}"
            yield Row(self.name, "", place, f"unreadable rows ({type(error).__name__})")


@functools.lru_cache(maxsize=4)
def load(name: str, subset: str, split: str) -> Any:
    """The ``datasets.Dataset``: downloaded once, then mapped from the local cache."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset(name, subset or None, split=split)


def hub_rows(name: str, subset: str, split: str, columns: Columns) -> list[HubRows]:
    """The items of one split of a data set. Raises UserError if there is none, or a column is missing."""
    if not name:
        raise UserError(
            f"source: name a data set, for example {PREFIX}rajpurkar/squad, or a folder {PREFIX}/data/squad"
        )
    try:
        dataset = load(name, subset, split)
    except Exception as error:  # no network, no such set, no such split: each has its own class in a library below
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"source: {PREFIX}{name}: {reason}") from None
    columns.check(list(dataset.column_names), f"{PREFIX}{name}")
    rows = len(dataset)
    row_bytes = max(1, (dataset.data.nbytes if dataset.data is not None else 0) // max(1, rows))
    return [
        HubRows(name, subset, split, first, min(first + ROWS_AN_ITEM, rows), ROWS_AN_ITEM * row_bytes, columns)
        for first in range(0, rows, ROWS_AN_ITEM)
    ]
