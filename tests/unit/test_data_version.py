"""The version of a data set depends on ids and texts, and on nothing else."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from workloads.corpus import documents_version

ROWS = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}, {"id": "c", "text": "three"}]


def write(folder: Path, *parts: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for number, rows in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    return folder


def test_files_and_order_do_not_matter_and_texts_do(tmp_path: Path) -> None:
    whole = documents_version(write(tmp_path / "whole", ROWS))
    assert whole and len(whole) == 16
    assert documents_version(write(tmp_path / "cut", ROWS[2:], ROWS[:2])) == whole
    assert documents_version(write(tmp_path / "changed", [*ROWS[:2], {"id": "c", "text": "four"}])) != whole


def test_documents_without_ids_have_no_version(tmp_path: Path) -> None:
    assert documents_version(write(tmp_path / "plain", [{"text": "one"}])) is None
