"""Runs of a cluster, read from a client that is no member of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_head import local_head
from workbench.config import Config
from workbench.files import read_json
from workbench.runs import finish, open_run
from workbench.session import ClusterAddress


class Example(Config):
    size: int = 3


@pytest.fixture(scope="module")
def head() -> Iterator[ClusterAddress]:
    with local_head(cpus=1) as cluster:
        yield cluster


@pytest.fixture
def there(runs_root: Path) -> Path:
    """A run below the cluster's runs root, with a file that is too large for a default pull of one MiB."""
    with open_run("data", "audit", Example(), name="wanted") as run:
        run.artifact("rows.bin").write_bytes(os.urandom(100_000))
        run.artifact("large.bin").write_bytes(bytes(2 << 20))
        finish(run, {"documents": 3})
    return run.folder


def workbench(head: ClusterAddress, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on the laptop: its runs root is ``here``; it knows the cluster's address and has its token."""
    variables = {
        "WORKBENCH_RUNS_ROOT": str(here),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(head.token_file),
    }
    argv = [sys.executable, "-m", "workbench", *arguments, "--address", head.dashboard]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120)


def test_a_run_is_listed_and_pulled_over_the_job_api(head: ClusterAddress, there: Path, tmp_path: Path) -> None:
    here, root = tmp_path / "here", there.parent.parent
    listed = workbench(head, here, "runs", "list", "--runs", str(root), "--json")
    assert listed.returncode == 0, listed.stderr
    [row] = json.loads(listed.stdout)
    assert (row["id"], row["summary"]) == (f"data-audit/{there.name}", {"documents": 3})

    done = workbench(head, here, "runs", "pull", row["id"], "--runs", str(root), "--max-size", "1", "--json")
    assert done.returncode == 0, done.stderr
    pulled = json.loads(done.stdout)
    folder = Path(pulled["folder"])
    assert folder == here / "data-audit" / there.name
    assert pulled["left_out"] == {"artifacts/large.bin": 2 << 20}
    assert (folder / "artifacts/rows.bin").read_bytes() == (there / "artifacts/rows.bin").read_bytes()
    assert read_json(folder / "summary.json") == {"documents": 3}
    assert not (folder / "artifacts/large.bin").exists()


def test_a_run_that_the_cluster_does_not_have_is_the_users_mistake(
    head: ClusterAddress, there: Path, tmp_path: Path
) -> None:
    root = there.parent.parent
    done = workbench(head, tmp_path / "here", "runs", "pull", f"data-audit/{there.name}x", "--runs", str(root))
    assert done.returncode == 2, done.stderr
    assert f"did you mean data-audit/{there.name}?" in done.stderr
    assert not (tmp_path / "here").exists()
