"""Rows of JSON lines: whole ones alone are read and kept, and a full disk is told of once."""

from pathlib import Path

import pytest
from full_disk import files_of_at_most

from workbench.row_file import BLOCK, RowFile, append_rows, read_rows


@pytest.mark.parametrize("left", ['{"step": 2, "lo', '{"step": 2}', "{" * (2 * BLOCK)])
def test_half_a_line_is_not_read_and_gives_way_to_the_next_row(tmp_path: Path, left: str) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, [{"step": 1}])
    whole = file.read_text()
    file.write_text(whole + left)
    append_rows(file, [{"step": 3}, {"step": 4}])
    assert file.read_text() == whole + '{"step": 3}\n{"step": 4}\n'


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n{"st')
    assert read_rows(file) == [{"step": 1}, {"step": 4}]


def test_rows_that_do_not_fit_are_told_once_and_those_after_are_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.add({"step": 1})
    with files_of_at_most(20):
        rows.add({"step": 2})
        rows.add({"step": 3})
    rows.add({"step": 4})
    assert rows.path.read_text() == '{"step": 1}\n{"step": 4}\n'
    assert capsys.readouterr().err == f"{rows.path} takes no rows at present: File too large\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_a_full_device_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    RowFile(tmp_path / "rows.jsonl").add({"step": 1})
    assert "No space left on device" in capsys.readouterr().err
