"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): who falls behind goes on from a better one.

At every ``perturb_steps`` a trial is compared with all that have come as far. One of the worst ``quantile`` ends; in
its place a new trial begins from the checkpoint of one of the best, at a point near that one's. It is a trial of its
own in the study, which knows its parent, so that nothing of it is hidden in another's curve. Tune's own class pauses
trials and hands checkpoints over itself, in a state that nobody else can read; ours end where they report, as always.
"""

import random
import shutil
from math import ceil
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune.config import SweepConfig
from tune.space import Point, Space
from tune.workload import OF_A_CHECKPOINT
from workloads.training.checkpoint import complete, step_of
from workloads.training.resume import copy_checkpoint

RESAMPLE = 0.25
"""Share of keys that are drawn anew, of those that may change."""

FACTORS = (0.8, 1.2)

TRIES = 64


class Population(FIFOScheduler):
    """Says STOP of a trial that is among the worst of those that have come as far."""

    def __init__(self, config: SweepConfig) -> None:
        super().__init__()
        self._metric, self._sign = config.metric, 1.0 if config.minimises else -1.0
        self._every, self._quantile = config.scheduler.perturb_steps, config.scheduler.quantile
        self._values: dict[int, dict[str, float]] = {}
        """By rung, the value of each that came to it."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """STOP at a rung, where ``trial`` is behind; an entrant is judged after the step at which it was ``born``."""
        rung, name = int(result["step"]) // self._every, str(trial.trial_id)
        reached = self._values.setdefault(rung, {})
        if rung == 0 or rung <= trial.born // self._every or name in reached:
            return TrialScheduler.CONTINUE
        reached[name] = self._sign * result[self._metric]
        return TrialScheduler.STOP if name in self.worst(rung) else TrialScheduler.CONTINUE

    def worst(self, rung: int) -> list[str]:
        """Those behind at ``rung``; as many are ahead."""
        order = sorted(self._values[rung], key=lambda name: self._values[rung][name])
        count = min(len(order) // 2, ceil(len(order) * self._quantile))
        return order[len(order) - count :]

    def best(self, step: int) -> list[int]:
        """The numbers of those ahead at the rung of ``step``, the best first."""
        reached = self._values.get(step // self._every, {})
        order = sorted(reached, key=lambda name: reached[name])
        return [int(name) for name in order[: min(len(order) // 2, ceil(len(order) * self._quantile))]]


def bred(space: Space, point: Point, dice: random.Random) -> Point:
    """A point near ``point`` that is allowed: each key drawn anew, times 0.8 or 1.2, or the next of a list; those that
    a checkpoint is made for stay. ``point`` itself where none is found."""
    for _ in range(TRIES):
        child = {
            key: value
            if key in OF_A_CHECKPOINT or key.partition(".")[0] in OF_A_CHECKPOINT
            else space.ranges[key].near(value, dice, RESAMPLE, FACTORS)
            for key, value in point.items()
            if key in space.ranges
        }
        if not space.outside(child) and not space.why_not(child):
            return child
    return {key: value for key, value in point.items() if key in space.ranges}


def donor_step(folder: Path, step: int) -> int | None:
    """The step of the checkpoint in a trial's ``folder`` that one at ``step`` would go on from: the last until then."""
    return max((found for path in complete(folder) if (found := step_of(path)) <= step), default=None)


def give_checkpoint(donor: Path, step: int, to: Path) -> None:
    """Have a trial whose checkpoints are in ``to``, and that has none, go on from the donor's of ``step``."""
    source = next((path for path in complete(donor) if step_of(path) == step), None)
    if source is None or complete(to):
        return
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    copy_checkpoint(source, to / source.name)
