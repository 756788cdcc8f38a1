"""A run's way through a job's log: whole and safe, or refused."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from cluster.runs_remote import MARK, Archive, copy, receive, send, unpack
from workbench.errors import Failure, UserError
from workbench.files import read_json, write_json
from workbench.runs import find_runs

RUN = "data-audit/20260101T000000"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "there" / RUN
    write_json(folder / "status.json", {"state": "finished", "host": "there", "pid": 1})
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "small.txt").write_text("small")
    (folder / "artifacts" / "large.bin").write_bytes(bytes(range(256)) * 1000)
    (folder / ".summary.json.1.1.partial").write_text("half")
    return folder


def pulled(lines: list[str], root: Path) -> tuple[Archive, Path]:
    with TemporaryFile() as packed:
        archive = receive(lines, packed)
        return archive, unpack(packed, archive, root, "http://there")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_arrives_as_it_was_among_the_other_lines_of_a_log(source: Path, tmp_path: Path) -> None:
    lines = ["Ray says something", *send(source, RUN, None), "and something else"]
    archive, folder = pulled([line + "\n" for line in lines], tmp_path / "here")
    assert folder == tmp_path / "here" / RUN
    assert names(folder) == {"status.json", "artifacts/small.txt", "artifacts/large.bin", "pulled.json"}
    assert (folder / "artifacts/large.bin").read_bytes() == (source / "artifacts/large.bin").read_bytes()
    assert archive.left_out == {}


def test_large_files_are_left_out_by_name(source: Path, tmp_path: Path) -> None:
    archive, folder = pulled(list(send(source, RUN, 1000)), tmp_path / "here")
    assert archive.left_out == {"artifacts/large.bin": 256_000}
    assert "artifacts/large.bin" not in names(folder)
    assert read_json(folder / "pulled.json") == {"from": "http://there", "left_out": archive.left_out}


def test_a_damaged_archive_is_refused(source: Path, tmp_path: Path) -> None:
    lines = list(send(source, RUN, None))
    payload = bytearray(base64.b64decode(lines[0].removeprefix(MARK)))
    payload[100] ^= 1
    with pytest.raises(Failure, match="SHA-256 differs"):
        pulled([MARK + base64.b64encode(payload).decode(), *lines[1:]], tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_log_that_was_cut_off_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no end mark"):
        pulled(list(send(source, RUN, None))[:-1], tmp_path / "here")


def test_a_run_that_is_here_already_is_not_touched(source: Path, tmp_path: Path) -> None:
    lines = list(send(source, RUN, None))
    _, folder = pulled(lines, tmp_path / "here")
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is there already"):
        pulled(lines, tmp_path / "here")
    assert (folder / "mine.txt").read_text() == "keep"


def lines_of(members: dict[str, tarfile.TarInfo], run: str = RUN) -> list[str]:
    """An archive that a hostile sender might make."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, member in members.items():
            member.name = name
            archive.addfile(member)
    data = packed.getvalue()
    end = {"run": run, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "left_out": {}}
    return [MARK + base64.b64encode(data).decode(), MARK + json.dumps(end)]


def symlink(target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize("members", [{"../../evil": tarfile.TarInfo()}, {"link": symlink("/etc")}])
def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, members: dict[str, tarfile.TarInfo]) -> None:
    with pytest.raises(Failure, match="not safe"):
        pulled(lines_of({**members, "status.json": tarfile.TarInfo()}), tmp_path / "here")
    assert find_runs(tmp_path / "here") == []
    assert not list((tmp_path / "here").rglob("evil"))


@pytest.mark.parametrize("run", ["../x", "x", "a/b/c", "a/..", "/etc/x"])
def test_a_run_name_cannot_lead_elsewhere(tmp_path: Path, run: str) -> None:
    with pytest.raises(Failure, match="which is no GROUP-COMMAND"):
        pulled(lines_of({"status.json": tarfile.TarInfo()}, run), tmp_path / "here")


def test_an_archive_without_a_status_is_no_run_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="it is no run folder"):
        pulled(lines_of({"x": tarfile.TarInfo()}), tmp_path / "here")
    assert find_runs(tmp_path / "here") == [] and not names(tmp_path / "here")


def test_a_mounted_run_is_copied(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "here")
    assert names(folder) == {"status.json", "artifacts/small.txt", "artifacts/large.bin", "pulled.json"}
    assert find_runs(tmp_path / "here") == [folder]
