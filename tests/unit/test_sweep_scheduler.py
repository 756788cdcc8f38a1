"""Tune's schedulers inside ours: who is told to end, who is spared, and what earlier sessions leave behind."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.schedulers import TrialScheduler

from tune.config import SweepConfig
from tune.scheduler import Curve, SweepScheduler, inner_scheduler
from workbench.config import load


class Sweep:
    """Notes what the scheduler tells; ``leaving`` are the trials that the user or the budget ends."""

    def __init__(self) -> None:
        self.curves: dict[int, Curve] = {}
        self.stopped: list[tuple[int, int]] = []
        self.spared: list[tuple[int, int]] = []
        self.leaving: set[int] = set()
        self.late: set[int] = set()
        self.started: list[int] = []
        self.repeated: set[int] = set()

    def curve(self, number: int) -> Curve:
        return self.curves.get(number, [])

    def born(self, number: int) -> int:
        return 0

    def judged(self, number: int) -> bool:
        return number not in self.repeated

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        return number not in self.leaving

    def stop_early(self, number: int, step: int) -> None:
        self.stopped.append((number, step))

    def spare(self, number: int, step: int) -> None:
        self.spared.append((number, step))

    def begun(self, number: int) -> None:
        self.started.append(number)

    def overdue(self, number: int) -> bool:
        return number in self.late

    def in_vain(self, number: int) -> bool:
        return number in self.late


def config(**rule: Any) -> SweepConfig:
    keys = [f"scheduler.{key}={value}" for key, value in rule.items()]
    shared = ["config.base=owner/model", "config.steps=40", "config.validate_every=10", "space.seed.choice=[1, 2]"]
    return load(SweepConfig, None, [*shared, "scheduler.grace_steps=10", *keys])


def scheduler(sweep: Sweep, **rule: Any) -> SweepScheduler:
    made = config(**rule)
    return SweepScheduler(inner_scheduler(made, made.config.steps), sweep, made)


def trial(number: int) -> Any:
    return SimpleNamespace(config={"number": number, "point": {}}, trial_id=f"{number:05d}_1", status="RUNNING")


def run(made: SweepScheduler, losses: dict[int, float], steps: tuple[int, ...] = (10, 20, 40)) -> None:
    """Trials that report one after the other at each step, the first best."""
    trials = {number: trial(number) for number in losses}
    for each in trials.values():
        made.on_trial_add(None, each)
    for step in steps:
        for number, loss in losses.items():
            result = {"step": step, "validation_loss": loss}
            assert made.on_trial_result(None, trials[number], result) == TrialScheduler.CONTINUE


def test_asha_ends_those_that_fall_behind() -> None:
    sweep = Sweep()
    run(scheduler(sweep, spare=0), {0: 1.0, 1: 2.0, 2: 3.0}, steps=(10,))
    assert sweep.stopped == [(1, 10), (2, 10)]


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_trial_at_its_last_step_is_not_judged(kind: str) -> None:
    sweep = Sweep()
    run(scheduler(sweep, kind=kind, spare=0), {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 9.0}, steps=(40,))
    assert sweep.stopped == []


def test_the_median_rule_ends_those_behind_the_median() -> None:
    sweep = Sweep()
    run(scheduler(sweep, kind="median", spare=0), {0: 1.0, 1: 1.1, 2: 1.2, 3: 9.0}, steps=(10, 20))
    assert (3, 10) in sweep.stopped
    assert 0 not in dict(sweep.stopped)


def test_without_a_scheduler_all_come_to_their_end() -> None:
    sweep = Sweep()
    run(scheduler(sweep, kind="none"), {0: 1.0, 1: 9.0})
    assert sweep.stopped == []


def test_a_spared_trial_is_told_of_once_and_not_judged_again() -> None:
    sweep = Sweep()
    run(scheduler(sweep, spare=1), {0: 1.0, 1: 2.0})
    assert sweep.stopped == []
    assert sweep.spared == [(1, 10)]


def test_about_the_stated_share_is_spared() -> None:
    sweep = Sweep()
    run(scheduler(sweep, spare=0.3), {number: 1.0 + number for number in range(200)}, steps=(10,))
    assert len(sweep.spared) + len(sweep.stopped) == 199
    assert 35 <= len(sweep.spared) <= 85


def test_trials_are_compared_with_those_of_earlier_sessions() -> None:
    sweep = Sweep()
    made = scheduler(sweep, spare=0)
    made.remember(0, [(10, 1.0), (20, 0.9)])
    run(made, {1: 2.0}, steps=(10,))
    assert sweep.stopped == [(1, 10)]


def test_a_trial_that_goes_on_is_not_compared_with_itself() -> None:
    sweep = Sweep()
    sweep.curves[0] = [(10, 1.0)]
    run(scheduler(sweep, spare=0), {0: 2.0}, steps=(10,))
    assert sweep.stopped == []


def test_a_trial_that_is_repeated_is_not_judged_and_judges_nobody() -> None:
    sweep = Sweep()
    sweep.repeated = {0}
    run(scheduler(sweep, spare=0), {0: 1.0, 1: 9.0}, steps=(10,))
    assert sweep.stopped == []


def test_a_trial_that_leaves_is_not_judged() -> None:
    sweep = Sweep()
    sweep.leaving = {1}
    run(scheduler(sweep, spare=0), {0: 1.0, 1: 9.0})
    assert sweep.stopped == []


@pytest.mark.parametrize("late", [True, False])
def test_tune_stops_a_trial_that_would_begin_in_vain(late: bool) -> None:
    sweep, stopped = Sweep(), []
    sweep.late = {0} if late else set()
    waiting = trial(0)
    waiting.status = "PENDING"
    controller = SimpleNamespace(
        get_live_trials=lambda: [waiting], get_trials=lambda: [waiting], stop_trial=stopped.append
    )
    scheduler(sweep).choose_trial_to_run(controller)
    assert stopped == ([waiting] if late else [])
    assert sweep.started == []


@pytest.mark.parametrize("late", [True, False])
def test_the_process_of_an_overdue_trial_is_killed(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, killed = Sweep(), []
    sweep.late = {0} if late else set()
    running = trial(0)
    running.temporary_state = SimpleNamespace(ray_actor="its actor")
    monkeypatch.setattr(ray, "kill", killed.append)
    scheduler(sweep).choose_trial_to_run(
        SimpleNamespace(get_live_trials=lambda: [running], get_trials=lambda: [running])
    )
    assert killed == (["its actor"] if late else [])
    assert sweep.started == [0]
