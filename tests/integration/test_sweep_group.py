"""Trials of two workers on real Ray: they are stopped early together, outlive a killed worker, and leave nothing."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import found, wait_until
from sweeps import ACTORS, folder_of, nothing_is_left, sweep, sweep_root, trials_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900), pytest.mark.soak]

PAIRS = ["config.workers=2", "config.strategy=fsdp2", "config.steps=20", "scheduler.grace_steps=5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sweep_root(tmp_path_factory.mktemp("groups")) as folder:
        yield folder


def test_a_trial_of_two_workers_is_stopped_early_and_outlives_a_killed_worker(root: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: folder_of(root, "pairs"), 240, "a study")
        folder = folder_of(root, "pairs")
        assert folder is not None
        wait_until(lambda: list(folder.glob("artifacts/trials/*/checkpoints/step-*")), 240, "a checkpoint")
        victim = found(os.getpid(), ACTORS[1])[0]
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    folder, summary = sweep(root, "pairs", "budget.trials=4", *PAIRS)
    killer.join(timeout=10)
    assert killed
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(4))
    assert summary["finished"] + summary["stopped_early"] == 4
    assert summary["stopped_early"] >= 1
    died = [attempt for trial in trials for attempt in trial.attempts if "died" in attempt]
    assert len(died) == 1
    assert all(trial.steps == 20 for trial in trials if trial.state == "finished")
    assert (folder / "artifacts" / "best" / "adapter" / "adapter_config.json").is_file()
    wait_until(nothing_is_left, 60, "the end of the trials' processes and placement groups")
