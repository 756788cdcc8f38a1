"""A sweep on real Ray Tune: trials end where they report, killed processes go on, and the study has each trial once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kills import wait_until
from sweeps import (
    actors,
    folder_of,
    is_under_way,
    last_checkpoint,
    nothing_is_left,
    overrides,
    resume,
    sweep,
    sweep_root,
    trials_of,
)  # fmt: skip

from tune.config import SweepConfig
from tune.study import SweepStudy
from tune.trial import RESULT
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import state_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sweep_root(tmp_path_factory.mktemp("sweeps")) as folder:
        yield folder


def test_trials_are_stopped_early_a_killed_one_goes_on_and_nothing_is_left(root: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: folder_of(root, "asha"), 240, "a study")
        folder = folder_of(root, "asha")
        assert folder is not None
        trials = folder / "artifacts" / "trials"
        wait_until(lambda: list(trials.glob("*/checkpoints/step-*")), 240, "a checkpoint")
        victim = actors()[0]
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    folder, summary = sweep(root, "asha", "budget.trials=5")
    killer.join(timeout=10)
    assert killed
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(5))
    assert summary["finished"] + summary["stopped_early"] == 5
    assert summary["finished"] >= 1
    assert all(trial.steps == 40 for trial in trials if trial.state == "finished")
    best = folder / "artifacts" / "best"
    again = load(type(load(SweepConfig, folder / "config.yaml").config), best / "config.yaml")
    assert again.learning_rate == summary["best_learning_rate"]
    assert (best / "adapter" / "adapter_config.json").is_file()
    assert (best / "merged" / "config.json").is_file()
    report = json.loads((folder / "report.json").read_text())
    assert {"Trials by host and card", "Quality against cost"} <= {section["title"] for section in report["sections"]}
    wait_until(nothing_is_left, 60, "the end of the trials' processes and placement groups")


def test_a_sweep_whose_driver_was_killed_goes_on_with_finished_trials_untouched(root: Path) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "workbench", "tune", "run", str(root / "space.yaml")]
    more = overrides(root, "budget.trials=4", "scheduler.kind=none", "config.steps=60")
    driver = subprocess.Popen([*command, *more, "--name", "killed"], env=environment)
    try:
        wait_until(lambda: folder_of(root, "killed"), 240, "a study")
        folder = folder_of(root, "killed")
        assert folder is not None
        wait_until(lambda: is_under_way(trials_of(folder)), 240, "a trial that has finished and one under way")
    finally:
        psutil.Process(driver.pid).kill()
        driver.wait()
    wait_until(lambda: not actors(), 60, "the end of the dead driver's trials")
    assert state_of(folder) == "lost"
    before = {trial.number: trial for trial in trials_of(folder)}
    kept = {number: last_checkpoint(folder, number) for number, trial in before.items() if not trial.ended}

    summary = resume(folder)
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(4))
    assert summary["finished"] == 4
    assert [trial for trial in trials if trial.number in before and before[trial.number].ended] == [
        trial for trial in before.values() if trial.ended
    ]
    assert {number: trials[number].facts["resumed_from"] for number in kept} == kept
    assert all((folder / "artifacts" / "trials" / str(number) / RESULT).is_dir() for number in range(4))

    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("warmup_steps: 2", "warmup_steps: 3"))
    with pytest.raises(UserError, match=r"began with config.warmup_steps=2, and its config.yaml now has 3"):
        resume(folder)


@pytest.mark.soak
def test_a_trial_that_hangs_is_ended_by_force_and_the_next_begins(root: Path) -> None:
    hung: list[psutil.Process] = []

    def hang() -> None:
        wait_until(lambda: folder_of(root, "hangs"), 240, "a study")
        folder = folder_of(root, "hangs")
        assert folder is not None
        wait_until(lambda: any(trial.curve for trial in trials_of(folder)), 240, "a look")
        hung.extend(actors())
        hung[0].suspend()
        SweepStudy(folder, {"validation_loss": "min"}).write_note("stop", [0])

    order = threading.Thread(target=hang, daemon=True)
    order.start()
    one_by_one = ["budget.trials=2", "concurrent=1", "scheduler.kind=none", "config.steps=400", "grace_seconds=2"]
    folder, summary = sweep(root, "hangs", *one_by_one)
    order.join(timeout=10)
    assert [trial.state for trial in trials_of(folder)] == ["stopped", "finished"]
    assert summary["best_trial"] == "1"
    assert len(hung) == 1
    wait_until(lambda: nothing_is_left() and not hung[0].is_running(), 60, "the end of the trials' processes")
