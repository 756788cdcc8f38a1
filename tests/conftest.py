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


LONGEST = (
    "test_serve", "test_train", "test_data", "test_jobs", "test_milvus_server", "test_train_kill", "test_embed_kill",
    "test_up_ssh", "test_sweep", "test_cards", "test_gateway",
)  # fmt: skip
"""Files that take minutes: they begin first, or one process would wait for the other at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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
