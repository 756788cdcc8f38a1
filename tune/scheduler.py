"""When a trial is stopped: Tune's own schedulers, less a share of their decisions that is ignored on purpose.

ASHA is Li et al. 2018, arXiv:1810.05934; the median rule is Golovin et al. 2017 (Vizier). A spared trial runs on to its
end, unseen by the scheduler from there on: its outcome says what stopping loses, and disturbs no other decision.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tune.config import SweepConfig
from tune.population import Population

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Entrant:
    """A trial as a scheduler of Tune's knows it: the same one in every session and attempt. In a population one that
    took another's place was ``born`` at a step."""

    trial_id: str
    born: int = 0


class Alone:
    """Tune's controller as a scheduler sees it: no trial waits, so none is ever asked to pause for another."""

    search_alg = None

    def get_live_trials(self) -> list[Any]:
        """None."""
        return []


class Sweep(Protocol):
    """What the scheduler asks of the sweep, and tells it."""

    def curve(self, number: int) -> Curve:
        """What the trial measured in earlier sessions."""

    def born(self, number: int) -> int:
        """The step at which the trial took another's place; 0 of most."""

    def judged(self, number: int) -> bool:
        """Whether the trial may be stopped early."""

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        """Take note of a result; whether the trial goes on, as far as the user and the budget are concerned."""

    def stop_early(self, number: int, step: int) -> None:
        """Have the trial write a checkpoint and end."""

    def spare(self, number: int, step: int) -> None:
        """The trial would have been stopped."""

    def begun(self, number: int) -> None:
        """The trial's process has begun."""

    def overdue(self, number: int) -> bool:
        """Whether the trial was to end and has not."""

    def in_vain(self, number: int) -> bool:
        """Whether the trial, whose process has not begun, will not begin."""


def inner_scheduler(config: SweepConfig, steps: int) -> TrialScheduler:
    """Tune's scheduler for trials of up to ``steps`` steps."""
    kind, rule = config.scheduler.kind, config.scheduler
    common: dict[str, Any] = {"time_attr": "step", "metric": config.metric, "mode": config.metrics[config.metric]}
    grace = min(rule.grace_steps, steps)
    if kind == "asha":  # at max_t it would stop a trial before its adapter is saved
        factor = rule.reduction_factor
        return AsyncHyperBandScheduler(**common, max_t=steps + 1, grace_period=grace, reduction_factor=factor)
    if kind == "median":  # hard, it would refuse to hear more of a trial that it has stopped
        return MedianStoppingRule(**common, grace_period=grace, hard_stop=False)
    return Population(config) if kind == "pbt" else FIFOScheduler()


class SweepScheduler(FIFOScheduler):
    """Tune's interface around ``inner``: sees every result, remembers earlier sessions, spares and obeys.

    A trial that is told to end does so where it reported. The process of one that is overdue is killed, which is a
    death to Tune: were Tune told to stop the trial, it would keep the process for the next, which would wait for ever.
    """

    def __init__(self, inner: TrialScheduler, sweep: Sweep, config: SweepConfig) -> None:
        super().__init__()
        self._inner, self._sweep, self._config = inner, sweep, config
        self._entrants: dict[int, Entrant] = {}
        self._unseen: set[int] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune has no metric to give: the inner scheduler has its own."""
        return True

    def remember(self, number: int, curve: Curve, spared_at: int = 0, born: int = 0) -> None:
        """Replay a trial of an earlier session: those that come are compared with it, too."""
        if number in self._entrants:
            return
        entrant = self._entrants[number] = Entrant(str(number), born)
        self._inner.on_trial_add(Alone(), entrant)
        for step, value in curve:
            self._decide(entrant, {"step": step, self._config.metric: value})
            if spared_at and step >= spared_at:
                self._unseen.add(number)
                break

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial begins, or goes on."""
        number = trial.config["number"]
        if self._sweep.judged(number):
            self.remember(number, self._sweep.curve(number), born=self._sweep.born(number))
        else:
            self._unseen.add(number)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Always CONTINUE: a trial that is to end learns it from the sweep."""
        number, step = trial.config["number"], result["step"]
        if not self._sweep.reported(number, result) or number in self._unseen:
            return TrialScheduler.CONTINUE
        last = trial.config["point"].get("steps", self._config.config.steps)
        if self._decide(self._entrants[number], result) != TrialScheduler.CONTINUE and step < last:
            self._unseen.add(number)
            if random.Random(f"spare {self._config.seed} {number}").random() < self._config.scheduler.spare:
                self._sweep.spare(number, step)
            else:
                self._sweep.stop_early(number, step)
        return TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """First come, first served; called in every round of Tune's, so that the overdue are found here."""
        for trial in list(tune_controller.get_live_trials()):
            number = trial.config["number"]
            if trial.status == Trial.PENDING and self._sweep.in_vain(number):
                tune_controller.stop_trial(trial)
            elif trial.status == Trial.RUNNING:
                self._sweep.begun(number)
                if self._sweep.overdue(number):
                    ray.kill(trial.temporary_state.ray_actor)
        return super().choose_trial_to_run(tune_controller)

    def _decide(self, entrant: Entrant, result: dict[str, Any]) -> str:
        decision: str = self._inner.on_trial_result(Alone(), entrant, result)
        return decision
