"""Twenty trials with early stopping while a trial's process and the driver are killed: each ends once, none is left."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kills import dice, wait_until
from sweeps import actors, folder_of, nothing_is_left, overrides, sweep_root, trials_of

from tune.space import identity
from tune.study import TrialRecord
from workbench.runs import state_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1800), pytest.mark.soak]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sweep_root(tmp_path_factory.mktemp("twenty")) as folder:
        yield folder


def ended(folder: Path) -> list[TrialRecord]:
    return [trial for trial in trials_of(folder) if trial.ended]


def test_twenty_trials_all_end_once_whatever_is_killed_and_nothing_is_left(root: Path) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    workbench = [sys.executable, "-m", "workbench", "tune"]
    more = overrides(root, "budget.trials=20", "scheduler.spare=0.1", "retries=3")
    driver = subprocess.Popen([*workbench, "run", str(root / "space.yaml"), *more, "--name", "twenty"], env=environment)
    chance = dice("twenty trials", 0)
    try:
        wait_until(lambda: folder_of(root, "twenty"), 240, "a study")
        folder = folder_of(root, "twenty")
        assert folder is not None
        wait_until(lambda: len(ended(folder)) >= 3 and actors(), 600, "three trials")
        chance.choice(actors()).kill()
        wait_until(lambda: len(ended(folder)) >= chance.randint(6, 12), 600, "more trials")
    finally:
        psutil.Process(driver.pid).kill()
        driver.wait()
    wait_until(lambda: not actors(), 60, "the end of the dead driver's trials")
    assert state_of(folder) == "lost"
    before = ended(folder)

    subprocess.run([*workbench, "resume", str(folder)], env=environment, check=True, timeout=1200)
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(20))
    assert {trial.state for trial in trials} == {"finished", "stopped early"}
    assert len({identity(trial.point) for trial in trials}) == 20
    assert [trial for trial in trials if trial.number in {each.number for each in before}] == before
    assert all(trial.steps == 40 for trial in trials if trial.state == "finished")
    assert all([step for step, _ in trial.curve] == list(range(5, trial.steps + 1, 5)) for trial in trials)
    assert any("died" in attempt for trial in trials for attempt in trial.attempts)
    wait_until(nothing_is_left, 60, "the end of the trials' processes and placement groups")
