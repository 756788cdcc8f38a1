"""Training whose host is killed goes on with the workers that are left, and with all of them when a host is back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from kills import wait_until
from raylets import bare_head, host
from training_runs import adapter, curve, folder_of, sft, training_root

import workloads.training.ray_train
from workbench.tracking import read_metrics

pytestmark = [pytest.mark.timeout(900), pytest.mark.soak]

STEPS = 600


@pytest.fixture
def cluster() -> Iterator[Any]:
    with bare_head() as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with training_root(tmp_path) as folder:
        yield folder


def workers(folder: Path) -> list[int]:
    """Of each step."""
    return [sum(name.startswith("peak_memory_gib/") for name in row) for row in read_metrics(folder)]


def test_training_goes_on_with_the_workers_that_are_left_and_with_all_again(
    cluster: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads.training.ray_train, "RESIZE_SECONDS", 5.0)
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", lambda _: None)  # a thread may set none
    host(cluster)
    lost = host(cluster)
    keys = [f"steps={STEPS}", "cpus_per_worker=1", "validate_every=0", "checkpoint_every=10"]

    def kill_and_replace() -> None:
        wait_until(lambda: (folder := folder_of(root, "elastic")) and len(read_metrics(folder)) > 20, 240, "20 steps")
        lost.kill_raylet()
        folder = folder_of(root, "elastic")
        assert folder is not None
        wait_until(lambda: 1 in workers(folder), 240, "a step of one worker")
        host(cluster)
        over.wait()  # a raylet ends with the thread that started it

    over = threading.Event()
    killer = threading.Thread(target=kill_and_replace, daemon=True)
    killer.start()
    folder, _ = sft(root, "elastic", *keys, "least_workers=1")
    assert [step for step, _ in curve(folder)] == list(range(1, STEPS + 1))
    assert workers(folder)[0] == workers(folder)[-1] == 2 and 1 in workers(folder)
    steady, _ = sft(root, "steady", *keys)
    over.set()
    killer.join(timeout=10)
    assert [loss for _, loss in curve(folder)] == pytest.approx([loss for _, loss in curve(steady)], abs=1e-4)
    ours, theirs = adapter(folder), adapter(steady)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)
