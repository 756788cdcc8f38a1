"""A cluster of one host, brought up over a real sshd on loopback and kept by Debian's runit, from first to last."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from loopback_sshd import SSHD, Sshd, loopback_sshd

CHECKOUT = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.2"
PORTS = (
    "gcs", "dashboard", "client", "node_manager", "object_manager", "agent", "agent_grpc", "runtime_env", "metrics",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="loopback has one address here"),
    pytest.mark.skipif(SSHD is None, reason="sshd is not here (Debian: openssh-server)"),
    pytest.mark.skipif(not shutil.which("runsvdir"), reason="runsvdir is not here (Debian: runit)"),
]


@dataclass
class Site:
    """One host, and a laptop's checkout that knows it by an inventory."""

    sshd: Sshd
    folder: Path
    inventory: dict[str, object]

    @property
    def environment(self) -> dict[str, str]:
        """The laptop's variables: ssh's way in, a state of its own, no runs root, so that the cluster's is used."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WORKBENCH_RUNS"))}
        return {
            **mine,
            "WORKBENCH_SSH_OPTIONS": self.sshd.options,
            "WORKBENCH_STATE": str(self.folder / "laptop"),
        }

    def workbench(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A command of the laptop's."""
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(self.inventory))
        return subprocess.run(
            [sys.executable, "-m", "workbench", *arguments], cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def status(self) -> dict[str, object]:
        """``cluster status --json``."""
        return json.loads(self.workbench("cluster", "status", "--json").stdout)

    def job(self, name: str) -> dict[str, object]:
        """``jobs status --json`` of a job, while the dashboard is open."""
        return json.loads(self.workbench("jobs", "status", name, "--json").stdout)

    @contextmanager
    def dashboard(self) -> Iterator[str]:
        """Keep ``cluster dashboard`` open for the block; its address."""
        command = [sys.executable, "-m", "workbench", "cluster", "dashboard"]
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True)
        try:
            session = self.folder / "laptop/cluster.json"
            until(lambda: session.exists() or process.poll() is not None)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield json.loads(session.read_text())["dashboard"]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
            assert process.returncode == 0
            assert not session.exists()

    def ray(self, name: str) -> list[psutil.Process]:
        """The processes of this host's Ray by program name."""
        return [
            process for process in psutil.process_iter(["name"]) if process.info["name"] == name and self.owns(process)
        ]

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process runs with the host's variables."""
        try:
            return process.environ().get("WORKBENCH_CLUSTER") == self.inventory["name"]
        except psutil.Error:
            return False


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wbup", ignore_cleanup_errors=True)))
        sshd = stack.enter_context(loopback_sshd(folder, ADDRESS))
        (folder / "storage").mkdir()
        (sshd.home / "service").mkdir()
        variables = {"HOME": str(sshd.home), "PATH": os.environ["PATH"], "USER": sshd.user}
        runit = subprocess.Popen(["runsvdir", "-P", str(sshd.home / "service")], env=variables, start_new_session=True)
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind((ADDRESS, 0))
        ports = {name: one.getsockname()[1] for name, one in zip(PORTS, sockets, strict=True)}
        for one in sockets:
            one.close()
        host = {
            "address": ADDRESS, "user": sshd.user, "ssh_port": sshd.port, "os": "linux", "supervisor": "runit",
            "environment": sys.prefix, "cpus": 2, "object_store_gb": 0.25,
        }  # fmt: skip
        inventory: dict[str, object] = {
            "name": f"t{os.getpid()}", "head": "only", "storage": str(folder / "storage"), "ports": ports,
            "hosts": {"only": host},
        }  # fmt: skip
        site = Site(sshd, folder, inventory)
        try:
            yield site
        finally:
            left = [process for process in psutil.process_iter() if site.owns(process)]
            runit.send_signal(signal.SIGHUP)  # ends its runsv, which end what they keep
            runit.wait(20)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(f"/tmp/workbench-{inventory['name']}-{os.getuid()}", ignore_errors=True)


def test_up_brings_the_host_up_and_a_second_up_changes_nothing(site: Site) -> None:
    first = site.workbench("cluster", "up")
    assert first.returncode == 0, first.stderr
    assert "changed: only" in first.stderr
    [raylet] = site.ray("raylet")
    token = site.sshd.home / ".workbench/token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE((site.folder / f"laptop/clusters/{site.inventory['name']}/token").stat().st_mode) == 0o600

    second = site.workbench("cluster", "up")
    assert second.returncode == 0, second.stderr
    assert "only: as it should be" in second.stderr
    assert "nothing to change" in second.stderr
    assert [process.pid for process in site.ray("raylet")] == [raylet.pid]


def test_no_secret_is_in_a_file_that_others_may_read_or_on_a_command_line(site: Site) -> None:
    token = (site.sshd.home / ".workbench/token").read_text()
    for file in site.sshd.home.rglob("*"):
        if file.is_file() and token.encode() in file.read_bytes():
            assert file == site.sshd.home / ".workbench/token"
    for process in psutil.process_iter():
        if site.owns(process):
            assert token not in " ".join(process.cmdline())
            assert token not in process.environ().values()


def test_status_tells_of_the_host(site: Site) -> None:
    status = site.status()
    host = status["hosts"]["only"]  # type: ignore[index]
    assert {"in_cluster": True, "supervisor": "runit: active", "current": True, "error": ""}.items() <= host.items()
    assert host["versions"]["ray"] == "2.60.0"
    assert host["total"]["CPU"] == 2


def test_a_job_goes_through_the_tunnel_and_writes_to_the_shared_storage(site: Site) -> None:
    with site.dashboard():
        done = site.workbench("submit", "--json", "--name", "listing", "--", "runs", "list", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"job": "listing", "exit_code": 0}
        assert site.workbench("jobs", "logs", "listing").stdout.endswith("[]\n")


def test_a_restart_asks_first_while_a_job_runs(site: Site) -> None:
    before = [process.pid for process in site.ray("raylet")]
    with site.dashboard():
        command = ["submit", "--detach", "--name", "long", "--", "profile", "record", "seconds=300"]
        assert site.workbench(*command).returncode == 0
        until(lambda: site.job("long")["state"] == "RUNNING")
        until(lambda: any((site.folder / "storage/runs/profile-record").glob("*/status.json")))
        site.inventory["hosts"]["only"]["cpus"] = 1  # type: ignore[index]
        refused = site.workbench("cluster", "up")
        assert refused.returncode == 2
        assert re.search(r"long on only: python -m workbench profile record", refused.stderr)
        assert [process.pid for process in site.ray("raylet")] == before
        status = site.status()
        assert status["hosts"]["only"]["jobs"] == ["long"]  # type: ignore[index]
        site.inventory["hosts"]["only"]["cpus"] = 2  # type: ignore[index]
        assert "nothing to change" in site.workbench("cluster", "up").stderr
        assert site.workbench("jobs", "stop", "long").returncode == 0


def test_a_killed_head_comes_back_by_itself_and_knows_its_jobs(site: Site) -> None:
    with site.dashboard():
        command = ["submit", "--detach", "--name", "cut", "--", "profile", "record", "seconds=300"]
        assert site.workbench(*command).returncode == 0
        until(lambda: site.job("cut")["state"] == "RUNNING")
    [raylet] = site.ray("raylet")
    [gcs] = site.ray("gcs_server")
    gcs.kill()
    until(lambda: not raylet.is_running() and len(site.ray("raylet")) == 1)
    until(lambda: site.workbench("cluster", "status").returncode == 0)
    with site.dashboard():
        assert site.job("listing")["state"] == "SUCCEEDED"
        until(lambda: site.job("cut")["state"] == "FAILED")


def test_push_copies_to_the_shared_storage_and_again_only_what_changed(site: Site) -> None:
    corpus = site.folder / "corpus"
    (corpus / "part").mkdir(parents=True)
    (corpus / "part/a.txt").write_text("one")
    for text in ("one", "three"):
        (corpus / "part/a.txt").write_text(text)
        done = site.workbench("cluster", "push", "corpus")
        assert done.returncode == 0, done.stderr
        there = Path(done.stdout.strip())
        assert there == site.folder / "storage/data/corpus"
        assert (there / "part/a.txt").read_text() == text
    spaced = site.folder / "two words.txt"
    spaced.write_text("x")
    done = site.workbench("cluster", "push", "two words.txt", "--json")
    assert Path(json.loads(done.stdout)["uri"]).read_text() == "x"
    missing = site.workbench("cluster", "push", "nothing-here")
    assert (missing.returncode, "no such file or folder" in missing.stderr) == (2, True)


def test_after_a_rotation_the_old_token_is_refused(site: Site) -> None:
    old = site.folder / "old_token"
    old.write_text((site.sshd.home / ".workbench/token").read_text())
    rotated = site.workbench("cluster", "rotate-token", "--yes")
    assert rotated.returncode == 0, rotated.stderr
    assert (site.sshd.home / ".workbench/token").read_text() != old.read_text()
    with site.dashboard() as address:
        assert site.workbench("jobs", "list").returncode == 0
        variables = {**site.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(old)}
        command = [sys.executable, "-m", "workbench", "jobs", "list", "--address", address]
        stale = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        assert stale.returncode == 2
        assert "refused" in stale.stderr
    copy = site.folder / f"laptop/clusters/{site.inventory['name']}/token"
    copy.write_text(old.read_text())  # as on a laptop that did not see the rotation
    again = site.workbench("cluster", "up")
    assert again.returncode == 0, again.stderr
    assert "another token" in again.stderr and "nothing to change" in again.stderr
    assert copy.read_text() == (site.sshd.home / ".workbench/token").read_text() != old.read_text()


def test_status_of_a_silent_head_shows_what_the_supervisor_says(site: Site) -> None:
    service = f"{site.sshd.home}/.workbench/sv/workbench-{site.inventory['name']}"
    subprocess.run(["sv", "-w", "30", "down", service], check=True, stdout=subprocess.DEVNULL)
    shown = site.workbench("cluster", "status")
    assert shown.returncode == 1
    assert "the head does not answer" in shown.stdout
    assert "runit: stopped" in shown.stdout
    assert "--- start at" in (site.sshd.home / ".workbench/ray.log").read_text()
    again = site.workbench("cluster", "up")
    assert again.returncode == 0, again.stderr
    assert "start Ray (Ray is stopped)" in again.stderr


def test_down_stops_what_up_started_and_nothing_else(site: Site) -> None:
    done = site.workbench("cluster", "down")
    assert done.returncode == 0, done.stderr
    _, left_behind = psutil.wait_procs([one for one in psutil.process_iter() if site.owns(one)], timeout=30)
    assert [one.cmdline() for one in left_behind] == []
    assert os.listdir(site.sshd.home / "service") == []
    left = set(os.listdir(site.sshd.home / ".workbench"))
    assert left <= {"token", "ray.log", "ray.log.1", "ray", "sv"}
    assert site.workbench("cluster", "down").returncode == 0
