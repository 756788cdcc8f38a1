"""The documents that an audit or a filter wrote."""

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

PHONE_REGION = b"phone_region"
"""Where the documents' Parquet schema says in which region phone numbers were sought."""


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


def phone_region_of(schema: "pa.Schema") -> str:
    """In which region an audit sought phone numbers; "" where it sought only international ones."""
    return (schema.metadata or {}).get(PHONE_REGION, b"").decode()
