"""Recorded runs: what a list, a comparison, a rerun and a clean-up make of them."""

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made import made_recording

from workbench.files import read_json, write_json
from workbench.reproduce import is_timing
from workbench.run_records import Record, differences, differing, few_figures, prunable, record_row, remove
from workbench.runs import find_runs, latest


def a_run(root: Path, name: str, kind: str = "data-audit", state: str = "finished", **files: Any) -> Path:
    """A run folder as a command on another host left it; ``name`` begins with its day, as YYYYMMDD."""
    folder = root / kind / name
    started = datetime.datetime.strptime(name[:8], "%Y%m%d").replace(tzinfo=datetime.UTC).isoformat()
    command = kind.replace("-", " ", 1)
    status = {"state": state, "command": command, "started": started, "seconds": 5.0, "host": "there", "pid": 1}
    write_json(folder / "status.json", status)
    (folder / "config.yaml").write_text(files.pop("config", "size: 3\n"))
    for part, value in files.items():
        write_json(folder / f"{part}.json", value)
    return folder


def workbench(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ})


def test_a_row_says_what_when_and_on_which_commit(runs_root: Path) -> None:
    environment = {"git_commit": "abc", "git_clean": False}
    folder = a_run(runs_root, "20260101T000000-x", environment=environment, summary={"documents": 3})
    assert record_row(folder) == {
        "id": "data-audit/20260101T000000-x",
        "command": "data audit",
        "state": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 5.0,
        "commit": "abc",
        "clean": False,
        "host": "there",
        "cost": {"gpu_hours": 0.0, "joules": None, "money": None, "currency": "EUR"},
        "summary": {"documents": 3},
        "folder": str(folder),
    }


def test_the_list_can_be_narrowed_by_kind_and_state(runs_root: Path) -> None:
    a_run(runs_root, "20260101T000000")
    a_run(runs_root, "20260102T000000", state="failed")
    a_run(runs_root, "20260103T000000", kind="train-sft")
    ids = [row["id"] for row in json.loads(workbench("runs", "list", "--json").stdout)]
    assert ids == ["data-audit/20260101T000000", "data-audit/20260102T000000", "train-sft/20260103T000000"]
    narrowed = workbench("runs", "list", "--kind", "data-audit", "--state", "failed", "--json").stdout
    assert [row["id"] for row in json.loads(narrowed)] == ["data-audit/20260102T000000"]


def test_the_list_for_a_person_marks_uncommitted_changes(runs_root: Path) -> None:
    a_run(runs_root, "20260101T000000", environment={"git_commit": "0123456789", "git_clean": False})
    assert "01234567*" in workbench("runs", "list").stdout


@pytest.mark.parametrize("content", ["", '{"state": "fin', "[]", "{}", '{"state": 3}'])
def test_a_run_with_a_damaged_status_is_listed_as_such(runs_root: Path, content: str) -> None:
    whole, folder = a_run(runs_root, "20260101T000000"), a_run(runs_root, "20260102T000000")
    (folder / "status.json").write_text(content)
    rows = json.loads(workbench("runs", "list", "--json").stdout)
    assert [(row["state"], row["started"][:10]) for row in rows] == [
        ("finished", "2026-01-01"),
        ("damaged", "2026-01-02"),
    ]
    assert prunable(None, 1, None) == [folder]
    assert latest("data-audit") == whole
    assert workbench("runs", "show", folder.name).returncode == 0


def test_a_run_with_a_damaged_summary_is_listed_as_such_and_is_not_the_latest(runs_root: Path) -> None:
    whole, folder = a_run(runs_root, "20260101T000000"), a_run(runs_root, "20260102T000000")
    (folder / "summary.json").write_text('{"documents":')
    (folder / "config.yaml").write_text("{a: ")
    done = workbench("runs", "list", "--state", "damaged")
    assert done.returncode == 0 and folder.name in done.stdout and whole.name not in done.stdout, done.stderr
    assert latest("data-audit") == whole
    assert workbench("runs", "reproduce", folder.name).returncode == 2


def test_show_gives_every_part(runs_root: Path) -> None:
    a_run(runs_root, "20260101T000000", summary={"documents": 3}, inputs={"corpus": {"rows": 7}})
    shown = json.loads(workbench("runs", "show", "data-audit/latest", "--json").stdout)
    assert (shown["summary"], shown["config"], shown["inputs"]) == (
        {"documents": 3},
        {"size": 3},
        {"corpus": {"rows": 7}},
    )
    assert shown["status"]["state"] == "finished"


def test_few_figures_are_numbers_other_than_the_time() -> None:
    assert few_figures({"path": "/x", "ok": True, "seconds": 3, "documents": 5, "rate": 0.123456}) == (
        "documents=5 rate=0.1235"
    )


def test_a_comparison_names_what_differs_and_by_how_much(runs_root: Path) -> None:
    first = a_run(
        runs_root,
        "20260101T000000",
        config="size: 3\nindex: {ef: 1}\n",
        environment={"git_commit": "a", "packages": {"ray": "1", "torch": "2"}},
        inputs={"corpus": {"path": "/a", "sha256": "aa"}},
        summary={"documents": 200, "rate": 0.5, "same": 1},
    )
    second = a_run(
        runs_root,
        "20260102T000000",
        config="size: 3\nindex: {ef: 2}\n",
        environment={"git_commit": "b", "packages": {"ray": "1", "torch": "3"}},
        inputs={"corpus": {"path": "/b", "sha256": "bb"}},
        summary={"documents": 150, "rate": 0.5, "same": 1},
    )
    parts = differences([Record.read(first), Record.read(second)])
    assert [row["key"] for row in parts["config"]] == ["index.ef"]
    assert {row["key"]: row["values"] for row in parts["environment"]} == {
        "git_commit": ["a", "b"],
        "torch": ["2", "3"],
    }
    assert parts["inputs"] == [{"key": "corpus", "values": ["aa", "bb"]}]
    assert parts["summary"] == [{"key": "documents", "values": [200, 150], "difference": [-50], "relative": [-0.25]}]


def test_a_path_inside_the_run_folder_is_no_difference(runs_root: Path) -> None:
    folders = [a_run(runs_root, f"2026010{day}T000000") for day in (1, 2)]
    for folder in folders:
        write_json(folder / "summary.json", {"model": f"{folder}/artifacts/model"})
    assert differences([Record.read(folder) for folder in folders])["summary"] == []


def test_a_key_of_one_side_is_a_difference_and_zero_has_no_relative_one() -> None:
    assert differing([{"a": 0}, {"a": 2, "b": True}]) == [
        {"key": "a", "values": [0, 2], "difference": [2], "relative": [None]},
        {"key": "b", "values": [None, True]},
    ]


@pytest.mark.parametrize(
    "key",
    [
        *("seconds", "train_seconds", "docs_per_second", "latency_p95_ms", "load.ttft_p50", "p50_ms"),
        *("ready_s", "first_completion_base_s", "m_best_tokens_per_s", "x.requests_per_s"),
    ],
)
def test_timing_figures_are_known_by_their_name(key: str) -> None:
    assert is_timing(key)


@pytest.mark.parametrize("key", ["documents", "second_best", "loss", "accuracy", "forms", "platency", "s", "rows"])
def test_other_figures_are_not_timing(key: str) -> None:
    assert not is_timing(key)


def recorded_report(tmp_path: Path) -> str:
    """Run ``profile report`` on a made recording; the run's id."""
    made_recording(tmp_path / "recording")
    done = workbench("profile", "report", f"recording={tmp_path / 'recording'}", "--json")
    assert done.returncode == 0, done.stderr
    return "profile-report/" + Path(json.loads(done.stdout)["run"]).name


def test_reproduce_repeats_a_run_and_finds_the_same_figures(runs_root: Path, tmp_path: Path) -> None:
    first = recorded_report(tmp_path)
    done = workbench("runs", "reproduce", first, "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["same"], result["differences"]) == (0, True, [])
    assert result["again"] != first and len(find_runs()) == 2


def test_reproduce_shows_a_figure_that_differs_and_timing_apart(runs_root: Path, tmp_path: Path) -> None:
    first = recorded_report(tmp_path)
    summary = runs_root / first / "summary.json"
    write_json(summary, {**read_json(summary), "cpu_peak_percent": 40.0, "seconds": 1e6})
    done = workbench("runs", "reproduce", first, "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["same"]) == (1, False)
    assert [(row["key"], row["values"]) for row in result["differences"]] == [("cpu_peak_percent", [40.0, 50.0])]
    assert "seconds" in [row["key"] for row in result["timing"]]


def test_reproduce_warns_of_another_commit_and_of_a_changed_input(runs_root: Path, tmp_path: Path) -> None:
    first = recorded_report(tmp_path)
    file = runs_root / first / "environment.json"
    write_json(file, {**read_json(file), "git_commit": "0" * 40, "git_clean": True})
    made_recording(tmp_path / "recording", busy=70)
    result = json.loads(workbench("runs", "reproduce", first, "--json").stdout)
    assert any(warning.startswith(f"git_commit was {'0' * 40}, is ") for warning in result["warnings"])
    assert any(warning.startswith("input 'recording' has changed") for warning in result["warnings"])


def test_only_a_finished_run_can_be_reproduced(runs_root: Path) -> None:
    a_run(runs_root, "20260101T000000", state="failed")
    done = workbench("runs", "reproduce", "20260101T000000")
    assert (done.returncode, "is failed" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("serve-up", "it made a server"),
        ("serve-loadtest", "all its figures are measured"),
        ("profile-record", "all its figures are measured"),
        ("serve-down", "the state that it met"),
        ("old-thing", "no command of this workbench"),
    ],
)
def test_a_run_that_cannot_be_reproduced_says_why(runs_root: Path, kind: str, why: str) -> None:
    a_run(runs_root, "20260101T000000", kind=kind)
    done = workbench("runs", "reproduce", "20260101T000000")
    assert done.returncode == 2 and why in done.stderr, done.stderr


def test_a_wrong_override_of_a_rerun_is_the_users_mistake(runs_root: Path, tmp_path: Path) -> None:
    first = recorded_report(tmp_path)
    done = workbench("runs", "reproduce", first, "recordin=x")
    assert done.returncode == 2 and "did you mean 'recording'" in done.stderr, done.stderr


def test_a_rerun_asks_for_the_secret_that_the_record_lacks(runs_root: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    config = f"documents: {tmp_path / 'documents'}\nuri: http://root:(secret)@host:19530\n"
    a_run(runs_root, "20260101T000000", kind="data-embed", config=config)
    done = workbench("runs", "reproduce", "20260101T000000")
    assert done.returncode == 2 and "give it again, as uri=VALUE" in done.stderr, done.stderr


def test_prune_keeps_the_newest_and_never_the_last_finished_nor_a_running_run(runs_root: Path) -> None:
    finished = a_run(runs_root, "20260101T000000")
    running = a_run(runs_root, "20260102T000000", state="running")
    failed = [a_run(runs_root, f"2026010{day}T000000", state="failed") for day in (3, 4, 5)]
    assert prunable(1, None, None) == failed[:2]
    newer = a_run(runs_root, "20260106T000000")
    assert prunable(1, None, None) == [finished, *failed]
    assert running not in prunable(1, None, None) and newer not in prunable(1, None, None)


def test_prune_by_age_and_by_kind(runs_root: Path) -> None:
    old = a_run(runs_root, "20200101T000000", state="failed")
    a_run(runs_root, time.strftime("%Y%m%dT%H%M%S"), state="failed")
    a_run(runs_root, "20200101T000000", kind="train-sft", state="failed")
    assert prunable(None, 30, "data-audit") == [old]
    assert prunable(5, 30, None) == []


def test_prune_deletes_only_when_told_to(runs_root: Path) -> None:
    for day in (1, 2, 3):
        a_run(runs_root, f"2026010{day}T000000")
    would = json.loads(workbench("runs", "prune", "--keep", "1", "--json").stdout)
    assert (would["deleted"], len(would["runs"]), len(find_runs())) == (False, 2, 3)
    did = json.loads(workbench("runs", "prune", "--keep", "1", "--yes", "--json").stdout)
    assert did["deleted"] and [folder.name for folder in find_runs()] == ["20260103T000000"]
    assert [path.name for path in runs_root.iterdir() if any(path.rglob("*.json"))] == ["data-audit"]


def test_what_an_interrupted_removal_left_is_no_run_and_goes_with_the_next(runs_root: Path) -> None:
    first, second = a_run(runs_root, "20260101T000000"), a_run(runs_root, "20260102T000000")
    left = runs_root / ".trash" / "1" / "data-audit-20260101T000000"
    left.parent.mkdir(parents=True)
    first.rename(left)
    assert find_runs() == [second]
    remove(second)
    assert find_runs() == [] and not left.exists()
