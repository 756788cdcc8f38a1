"""The command line from outside: exit codes, what goes to stdout, and that help is cheap."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from made import made_recording

from workbench.cli import GROUPS

COMMANDS = [(group, name) for group, (_, commands) in GROUPS.items() for name in commands]
HEAVY = {"torch", "ray", "transformers", "vllm", "pymilvus", "pandas", "pyarrow", "wandb", "plotly", "rdkit", "optuna"}


def workbench(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **variables})


def imported_by(*arguments: str) -> set[str]:
    script = (
        "import sys\nfrom workbench.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    argv = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("group", ["", *GROUPS, "runs", "jobs", "cluster"])
def test_help_imports_nothing_heavy(group: str) -> None:
    arguments = [group, "--help"] if group else ["--help"]
    assert not imported_by(*arguments) & HEAVY


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_help_of_a_command_needs_neither_torch_nor_ray(group: str, name: str) -> None:
    assert not imported_by(group, name, "--help") & {"torch", "ray", "transformers", "vllm"}


def test_help_of_a_command_lists_its_config_keys() -> None:
    shown = workbench("profile", "record", "--help").stdout
    assert "hertz" in shown and "samples a second on each host" in shown and "default 10.0" in shown


def test_the_shell_completes_groups() -> None:
    """As ``python -m workbench`` too, which the command becomes where its path has a space."""
    variables = {"_WORKBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "workbench pro", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "workbench"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.stdout.split() == ["profile"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["profile", "record", "hertx=2"], "unknown key 'hertx'; did you mean 'hertz'?"),
        (["profile", "record", "hertz=0"], "override 'hertz=0': hertz: Input should be greater than 0"),
        (["profile", "record", "hertz=often"], "override 'hertz=often': hertz:"),
        (["profile", "report", "recording=/no/such/folder"], "no such file or folder: /no/such/folder"),
        (["profile", "report"], "key 'recording' is required"),
        (["profile", "report", "recording=runs/profile-record/latest"], "no finished run of 'profile-record'"),
        (["profile", "record", "nonesuch.yaml"], "no such config file: nonesuch.yaml"),
        (["profile", "record", "a.yaml", "b.yaml"], "two config files were given"),
        (["profile", "record", "fast"], "'fast' is neither a config file (*.yaml) nor an override"),
        (["profile", "report", "recording=/tmp", "--name", "../up"], "run name '../up'"),
        (["profile", "recrod"], "Did you mean 'record'?"),
        (["prfile"], "Did you mean 'profile'?"),
        (["data", "audit", "source=installed-package"], "did you mean 'installed-packages'?"),
        (["data", "audit", "packages=[pandsa]"], "'pandsa' is not installed in this environment; did you mean pandas?"),
        (["train", "sft", "base=a/b", "data=rows.jsonl"], "override 'data=rows.jsonl': data.files.0: no such file"),
        (["runs", "show", "nothing"], "no run 'nothing'"),
        (["runs", "list", "--kind", "nothing"], "no runs of kind 'nothing'"),
        (["runs", "list", "--state", "finnished"], "did you mean 'finished'?"),
        (["runs", "prune"], "--keep N"),
        (["runs", "compare", "one"], "give two runs"),
    ],
)
def test_a_mistake_ends_with_2_and_leaves_nothing(runs_root: Path, arguments: list[str], expected: str) -> None:
    done = workbench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not runs_root.exists()


def test_json_is_all_there_is_on_stdout(runs_root: Path, tmp_path: Path) -> None:
    done = workbench("profile", "report", f"recording={made_recording(tmp_path / 'recorded')}", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["hosts"], summary["samples"], summary["cpu_mean_percent"]) == (1, 5, 50.0)
    assert (Path(summary["run"]) / "report.html").exists()
    assert Path(summary["run"]).parent == runs_root / "profile-report"


def test_a_damaged_recording_ends_with_2_and_its_reason(runs_root: Path, tmp_path: Path) -> None:
    folder = made_recording(tmp_path / "recorded")
    for part in folder.rglob("part-*"):
        part.write_bytes(b"PAR1 broken")
    done = workbench("profile", "report", f"recording={folder}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "they cannot be read" in done.stderr and "Traceback" not in done.stderr


class Refusing(BaseHTTPRequestHandler):
    """An endpoint that fails at every request."""

    def do_GET(self) -> None:  # the name is http.server's
        self.send_error(500, "out of order")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_failure_ends_with_1_and_its_reason_and_the_run_says_so(runs_root: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"base_url=http://127.0.0.1:{server.server_port}/v1"
        done = workbench("serve", "loadtest", url, OPENAI_API_KEY="a")
        server.shutdown()
    assert (done.returncode, done.stdout) == (1, "")
    assert "failed: " in done.stderr and "Error code: 500" in done.stderr and "Traceback" not in done.stderr
    [status] = runs_root.glob("serve-loadtest/*/status.json")
    assert json.loads(status.read_text())["state"] == "failed"
