"""A sweep over several raylets of which some are killed: it goes on elsewhere, and pauses where no host is left."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from kills import wait_until
from raylets import bare_head, host
from sweeps import folder_of, resume, sweep, sweep_root, trials_of

import tune.waiting

pytestmark = [pytest.mark.timeout(1800), pytest.mark.soak]

KEYS = ["budget.trials=4", "scheduler.kind=none", "config.cpus_per_worker=1", "config.steps=60", "retries=3"]


@pytest.fixture
def cluster() -> Iterator[Any]:
    with bare_head() as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with sweep_root(tmp_path) as folder:
        yield folder


def kill_when_under_way(root: Path, name: str, *raylets: Any) -> threading.Thread:
    """Kill raylets once every trial that has begun has written a checkpoint."""

    def kill() -> None:
        wait_until(lambda: folder_of(root, name), 240, "a study")
        folder = folder_of(root, name)
        assert folder is not None
        trials = folder / "artifacts" / "trials"
        wait_until(lambda: list(trials.glob("*/checkpoints/step-*")), 240, "a checkpoint")
        for raylet in raylets:
            raylet.kill_raylet()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    return killer


def test_the_trials_of_a_killed_raylet_go_on_elsewhere(cluster: Any, root: Path) -> None:
    host(cluster)
    killer = kill_when_under_way(root, "one-less", host(cluster))
    folder, summary = sweep(root, "one-less", *KEYS)
    killer.join(timeout=10)
    assert summary["finished"] == 4
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(4))
    assert all(trial.steps == 60 for trial in trials)
    assert sum("died" in attempt for trial in trials for attempt in trial.attempts) >= 1


def test_a_sweep_without_a_host_pauses_and_goes_on_with_a_new_one(
    cluster: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.waiting, "PATIENCE_SECONDS", 5.0)
    killer = kill_when_under_way(root, "none", host(cluster))
    folder, summary = sweep(root, "none", *KEYS)
    killer.join(timeout=10)
    assert "no host is left" in str(summary["paused"])
    assert summary["unfinished"] >= 1
    host(cluster)
    wait_until(lambda: ray.cluster_resources().get("CPU"), 60, "a core")
    assert resume(folder)["finished"] == 4
    assert [trial.number for trial in trials_of(folder)] == list(range(4))
