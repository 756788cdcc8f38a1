"""Shared fixtures: a runs root of the test's own, and a local Ray for each file."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children too
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does one under nohup
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "180")  # Ray's 60 are few where test processes share two cores
os.environ["WANDB_MODE"] = "offline"
os.environ["WORKBENCH_STATE"] = tempfile.mkdtemp(prefix="wb-state-")  # a head of the user's stays out of the tests
os.environ["WORKBENCH_MARKS"] = tempfile.mkdtemp(prefix="wb-marks-")  # another test process' work is not recorded
for _folder in ("WORKBENCH_STATE", "WORKBENCH_MARKS"):
    atexit.register(shutil.rmtree, os.environ[_folder], ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_cluster_named_by_the_test_before() -> Iterator[None]:
    """A client of a head names it to Ray's State API for the rest of the process."""
    yield
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)


@pytest.fixture
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs root for this test alone."""
    root = tmp_path / "runs"
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", str(root))
    return root


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray with token auth for the tests of a file: those of another may want a cluster of their own."""
    from workbench.session import connect

    with connect():
        yield
