"""Commands as Ray jobs on a head of our own: the path from a laptop to a cluster."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.job_client import job_client
from cluster.jobs import EntrypointResources, follow, submit
from cluster.local_head import local_head
from workbench.errors import UserError
from workbench.session import ClusterAddress

CHECKOUT = Path(__file__).resolve().parents[2]
LIST = ["runs", "list", "--json"]


@pytest.fixture(scope="module")
def head() -> Iterator[ClusterAddress]:
    with local_head(cpus=2) as cluster:
        yield cluster


def workbench(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_job_ends_with_the_exit_code_of_its_command(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    written: list[str] = []
    assert follow(client, submit(client, LIST, runs_root=tmp_path), written.append) == 0
    assert "[]" in "".join(written)
    assert follow(client, submit(client, ["data", "audit", "nonsense"], runs_root=tmp_path), written.append) == 2
    assert "'nonsense' is neither a config file" in "".join(written)


def test_submit_finds_the_running_head_and_prints_json_alone(head: ClusterAddress, tmp_path: Path) -> None:
    done = workbench("submit", "--json", "--name", "listing", "--", *LIST, WORKBENCH_RUNS_ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"job": "listing", "exit_code": 0}
    rows = json.loads(workbench("jobs", "list", "--json").stdout)
    assert {"job": "listing", "state": "SUCCEEDED"}.items() <= rows[0].items()
    assert workbench("jobs", "logs", "listing").stdout.endswith("[]\n")


def test_a_request_without_the_token_is_refused(head: ClusterAddress) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    assert head.token_file is not None
    assert stat.S_IMODE(head.token_file.stat().st_mode) == 0o600


def test_entrypoint_resources_reach_the_job(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    job = submit(client, LIST, runs_root=tmp_path, resources=EntrypointResources(cpus=0.5))
    assert follow(client, job, lambda _: None) == 0


def test_a_config_file_outside_the_checkout_is_refused_before_submission(head: ClusterAddress) -> None:
    done = workbench("submit", "--", "data", "audit", "missing.yaml")
    assert done.returncode == 2
    assert "missing.yaml is not in this checkout" in done.stderr


def test_an_unknown_job_is_a_user_error(head: ClusterAddress) -> None:
    done = workbench("jobs", "status", "nope")
    assert (done.returncode, "no job 'nope'" in done.stderr) == (2, True)


def test_a_job_id_that_exists_is_refused(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    submit(client, LIST, runs_root=tmp_path, name="twice")
    with pytest.raises(UserError, match="already"):
        submit(client, LIST, runs_root=tmp_path, name="twice")


def test_interrupting_submit_without_a_terminal_stops_the_job(head: ClusterAddress, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench", "submit", "--name", "long", "--", "profile", "record", "seconds=300"]
    environment = {**os.environ, "WORKBENCH_RUNS_ROOT": str(tmp_path)}
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    runs = tmp_path / "profile-record"
    _until(lambda: any(runs.glob("*/status.json")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    _until(lambda: json.loads(workbench("jobs", "status", "long", "--json").stdout)["state"] == "STOPPED")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_head_ends_with_the_command_that_started_it(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "workbench", "cluster", "local", "--cpus", "1"]
    environment = {**os.environ, "WORKBENCH_STATE": str(tmp_path)}
    parent = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stderr=subprocess.DEVNULL)
    _until((tmp_path / "cluster.json").exists)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    parent.send_signal(how)
    parent.wait(40)
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.2)
