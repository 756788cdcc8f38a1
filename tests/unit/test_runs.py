"""Run folders: what is written, when, and how a run that ended badly is told from one that runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.config import Config
from workbench.errors import UserError
from workbench.files import fingerprint, read_json, write_json
from workbench.runs import Run, describe_environment, find_runs, finish, latest, open_run, resolve_run, state_of


class Example(Config):
    size: int = 3
    api_key: str = ""
    uri: str = ""


@pytest.fixture(autouse=True)
def _root(runs_root: Path) -> None:
    """Every test has its own runs root."""


def make_run(**options: Any) -> Run:
    with open_run("data", "audit", Example(), **options) as run:
        finish(run, {"documents": 3})
    return run


def test_a_finished_run_holds_everything_to_repeat_it() -> None:
    with open_run("data", "audit", Example(size=5), name="first", argv=["data", "audit", "size=5"]) as run:
        run.input("corpus", rows=7)
        run.metrics(1, loss=0.5)
        finish(run, {"documents": 3})
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "inputs.json", "status.json", "summary.json", "report.html"}
    assert (run.folder / "config.yaml").read_text() == "size: 5\napi_key: ''\nuri: ''\n"
    assert read_json(run.folder / "summary.json") == {"documents": 3}
    assert read_json(run.folder / "inputs.json") == {"corpus": {"rows": 7}}
    assert read_json(run.folder / "environment.json")["argv"] == ["data", "audit", "size=5"]
    assert state_of(run.folder) == "finished"
    assert run.folder.name.endswith("-first")


def test_runs_of_one_second_get_folders_of_their_own() -> None:
    assert len({make_run().folder for _ in range(3)}) == 3


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "x" * 65])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    if name:
        with pytest.raises(UserError, match="run name"):
            make_run(name=name)
        assert find_runs() == []
    else:
        make_run(name=name)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_refused_run_leaves_nothing_that_was_not_there(runs_root: Path, earlier: bool) -> None:
    if earlier:
        (runs_root / "data-audit").mkdir(parents=True)
    with pytest.raises(UserError), open_run("data", "audit", Example()):
        raise UserError("no such thing")
    assert [path.name for path in runs_root.iterdir()] == (["data-audit"] if earlier else [])


def test_a_failed_run_keeps_its_error_and_has_no_summary() -> None:
    with pytest.raises(ZeroDivisionError), open_run("data", "audit", Example()):
        _ = 1 / 0
    [folder] = find_runs()
    assert state_of(folder) == "failed"
    assert "ZeroDivisionError" in (folder / "error.txt").read_text()
    assert read_json(folder / "status.json")["error"] == "division by zero"
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_says_so(stop: type[BaseException]) -> None:
    with pytest.raises(stop), open_run("data", "audit", Example()):
        raise stop
    assert state_of(find_runs()[0]) == "interrupted"


def test_a_run_is_running_while_its_process_lives() -> None:
    with open_run("data", "audit", Example()) as run:
        assert state_of(run.folder) == "running"


def test_a_run_whose_process_died_without_a_word_is_lost(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_json(tmp_path / "status.json", {"state": "running", "pid": dead.pid, "host": socket.gethostname()})
    assert state_of(tmp_path) == "lost"


def test_a_run_on_another_host_is_believed(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "pid": 1 << 22, "host": "another"})
    assert state_of(tmp_path) == "running"


def test_progress_is_in_the_status_while_it_runs() -> None:
    with open_run("data", "audit", Example()) as run:
        run.say("read 5 of 10")
        assert read_json(run.folder / "status.json")["progress"] == "read 5 of 10"


def test_an_input_is_recorded_by_its_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("one")
    with open_run("data", "audit", Example()) as run:
        run.input("data", file)
    recorded = read_json(run.folder / "inputs.json")["data"]
    assert recorded == {"path": str(file), "sha256": fingerprint(file)}


def test_a_fingerprint_changes_with_a_byte_and_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    first = fingerprint(tmp_path)
    (tmp_path / "a").write_text("two")
    second = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_a_fingerprint_follows_links_but_not_back(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a").write_text("one")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "above").symlink_to(folder, target_is_directory=True)
    first = fingerprint(folder)
    (elsewhere / "a").write_text("two")
    assert fingerprint(folder) != first


def test_there_is_no_fingerprint_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "none")


def test_secrets_reach_no_file_of_the_run() -> None:
    config = Example(api_key="sk-hidden", uri="http://root:hidden@host:19530")
    argv = ["data", "audit", "api_key=sk-hidden", "uri=http://root:hidden@host:19530"]
    with open_run("data", "audit", config, argv=argv) as run:
        run.metrics(1, loss=0.5)
        run.input("collection", uri=config.uri)
        run.report.table("What is there", [{"uri": config.uri}])
        run.report.text("Where", f"at {config.uri}")
        run.say(f"3 rows at {config.uri}")
        finish(run, {"uri": config.uri})
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert b"hidden" not in path.read_bytes(), path
    assert "http://root:(secret)@host:19530" in (run.folder / "config.yaml").read_text()


def test_a_failure_that_names_a_secret_is_recorded_without_it() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_run("data", "audit", Example(api_key="", uri="http://root:hidden@host")) as run,
    ):
        raise ZeroDivisionError("no rows at http://root:hidden@host")
    for path in run.folder.rglob("*"):
        assert not path.is_file() or b"hidden" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("uri=http://root:pa@ss@h:1", "uri=http://root:(secret)@h:1"),
        ("path=/x/http:/root:pass@h", "path=/x/http:/root:(secret)@h"),
        ("models=[{name: a, api_key: sk-1}]", "models=[{api_key: (secret), name: a}]"),
        ("model={api_key: [sk-1, sk-2]}", "model={api_key: [(secret), (secret)]}"),
        ("sizes=[1, 2]", "sizes=[1, 2]"),
        ("broken=[{api_key", "broken=[{api_key"),
        ("at=http://host:8265/a@b", "at=http://host:8265/a@b"),
    ],
)
def test_an_argument_is_masked_wherever_its_secret_stands(argument: str, expected: str) -> None:
    from workbench.redact import redact_argument

    assert redact_argument(argument) == expected


def test_keys_that_only_sound_secret_are_kept() -> None:
    from workbench.redact import redact

    harmless = {"max_tokens": 5, "tokenizer": "x", "key_columns": "id", "token_file": "/x", "tokens": "many"}
    assert redact(harmless) == harmless


def test_the_environment_names_commit_packages_and_host() -> None:
    facts = describe_environment()
    assert len(facts["git_commit"]) == 40
    assert facts["packages"]["pydantic"] and facts["host"] == socket.gethostname()
    assert isinstance(facts["gpus"], list)


def test_a_submitted_job_records_the_commit_it_was_submitted_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_GIT_COMMIT", "abc")
    monkeypatch.setenv("WORKBENCH_GIT_CLEAN", "1")
    facts = describe_environment()
    assert (facts["git_commit"], facts["git_clean"]) == ("abc", True)


def test_a_run_is_found_by_each_of_its_names(runs_root: Path) -> None:
    folder = make_run(name="mine").folder
    references = [str(folder), folder.name, f"data-audit/{folder.name}", "data-audit/latest", "runs/data-audit/latest"]
    assert {resolve_run(reference) for reference in references} == {folder}


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    folder = make_run(name="mine").folder
    with pytest.raises(UserError, match=f"did you mean data-audit/{folder.name}"):
        resolve_run(f"data-audit/{folder.name}x")


def test_a_name_of_several_runs_is_refused_with_all_of_them(runs_root: Path) -> None:
    for kind in ("data-audit", "data-embed"):
        write_json(runs_root / kind / "same" / "status.json", {"state": "finished", "host": "h", "pid": 1})
    with pytest.raises(UserError, match="names 2 runs: data-audit/same, data-embed/same"):
        resolve_run("same")


def test_the_latest_of_no_run_is_an_error() -> None:
    with pytest.raises(UserError, match="no finished run of 'data-audit'"):
        latest("data-audit")


def test_a_summary_of_values_that_json_does_not_know_is_still_json() -> None:
    with open_run("data", "audit", Example()) as run:
        finish(run, {"folder": Path("/x"), "rate": 1.5})
    assert json.loads((run.folder / "summary.json").read_text()) == {"folder": "/x", "rate": 1.5}


def test_a_half_written_file_is_never_seen_under_its_name(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; import workbench.files as f\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "f.write_atomic(Path(sys.argv[1]), 'new')\n"
    )
    target = tmp_path / "summary.json"
    target.write_text("old")
    assert subprocess.run([sys.executable, "-c", script, str(target)], env={**os.environ}).returncode == 9
    assert target.read_text() == "old"
