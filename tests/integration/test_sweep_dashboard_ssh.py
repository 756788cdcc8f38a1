"""``tune dashboard --cluster``: a laptop sees a sweep of a cluster whose head it reaches by ssh alone."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import wait_until
from loopback_sshd import SSHD, Sshd, loopback_sshd

import tune.remote_dashboard
from cluster.client_state import token_copy
from cluster.inventory import Inventory
from cluster.local_head import local_head
from tune.config import SweepConfig
from tune.study import SweepStudy
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import finish, open_run

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.soak,
    pytest.mark.skipif(SSHD is None or sys.platform != "linux", reason="sshd is not here (Debian: openssh-server)"),
]


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inventory]:
    """A cluster of one head that runs here, reached by ssh; its storage has one sweep."""
    (tmp_path / "ssh").mkdir()
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", str(tmp_path / "storage" / "runs"))
    with loopback_sshd(tmp_path / "ssh", "127.0.0.2") as sshd, local_head() as head:
        monkeypatch.setenv("WORKBENCH_SSH_OPTIONS", sshd.options)
        made = _inventory(sshd, int(head.dashboard.rpartition(":")[2]), tmp_path)
        token_copy(made).parent.mkdir(parents=True)
        assert head.token_file is not None
        token_copy(made).write_text(head.token_file.read_text())
        token_copy(made).chmod(0o600)
        yield made


def _inventory(sshd: Sshd, dashboard: int, folder: Path) -> Inventory:
    host = {"address": sshd.address, "user": sshd.user, "ssh_port": sshd.port, "os": "linux", "cpus": 2}
    return Inventory.model_validate(
        {"head": "here", "hosts": {"here": host}, "storage": str(folder / "storage"), "ports": {"dashboard": dashboard}}
    )


def test_the_pages_of_a_clusters_sweep_are_served_here(inventory: Inventory) -> None:
    config = load(SweepConfig, None, ["config.base=owner/model", "space.learning_rate.loguniform=[0.001, 0.1]"])
    with open_run("tune", "run", config) as run:
        study = SweepStudy(run.folder, config.metrics, create=True)
        study.enqueue({"learning_rate": 0.01})
        finish(run, {})
    said: list[str] = []

    class Seen(Exception):
        """The pages have been looked at."""

    def look(line: str) -> None:
        said.append(line)
        if line.startswith("study"):
            page = line.split()[1].removesuffix("/dashboard")
            with urllib.request.urlopen(f"{page}/api/studies", timeout=60) as answer:
                assert len(json.load(answer)["study_summaries"]) == 1
        if line.startswith("Ray "):
            raise Seen

    with pytest.raises(Seen):
        tune.remote_dashboard.serve_from(inventory, f"tune-run/{run.folder.name}", look)
    assert [line.split()[0] for line in said] == ["study", "TensorBoard", "Ray"]
    wait_until(lambda: not _serving(), 60, "the end of the job that served")
    with pytest.raises(UserError, match="no run"):
        tune.remote_dashboard.serve_from(inventory, "tune-run/20990101T000000", said.append)


def _serving() -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return any("workbench tune dashboard" in line and "--port 0" in line for line in listed.splitlines())
