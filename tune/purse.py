"""What a sweep has spent of its budget, over all its sessions."""

import time

from tune.config import BudgetConfig
from tune.study import SweepStudy

ALIVE_SECONDS = 10.0
"""Between two signs of life in the study."""


class Purse:
    """The budget as configured, or as the user has extended it since, and what is left of it."""

    def __init__(self, budget: BudgetConfig, study: SweepStudy) -> None:
        self._configured, self._study = budget, study
        self._began, self._signed = time.time(), 0.0
        self._before = float(study.note("alive", {}).get("spent", 0.0))

    @property
    def budget(self) -> BudgetConfig:
        """What counts now."""
        return self._configured.model_copy(update=self._study.note("budget", {}))

    def has_trials(self) -> bool:
        """Whether a new trial may begin; those that repeat another, or take its place, are not counted."""
        if self._study.note("reached"):
            return False
        return self.budget.trials is None or counted_trials(self._study) < self.budget.trials

    def out_of_time(self) -> str:
        """Why all trials must pause, or empty."""
        budget, now = self.budget, time.time()
        if budget.hours is not None and self._seconds() >= budget.hours * 3600:
            return f"its {budget.hours:g} hours are spent"
        if budget.gpu_hours is not None:
            attempts = [attempt for trial in self._study.trials() for attempt in trial.attempts]
            spent = sum((each.get("ended", now) - each["began"]) * each.get("gpus", 0.0) for each in attempts)
            if spent >= budget.gpu_hours * 3600:
                return f"its {budget.gpu_hours:g} GPU-hours are spent"
        return ""

    def sign_now_and_then(self) -> None:
        """Give a sign of life, where the last is some time ago."""
        if time.time() - self._signed > ALIVE_SECONDS:
            self.sign()

    def sign(self, alive: bool = True) -> None:
        """Say in the study that a driver is at work, or has left, and what has been spent on the clock."""
        self._signed = time.time()
        self._study.write_note("alive", {"at": self._signed if alive else 0.0, "spent": self._seconds()})

    def _seconds(self) -> float:
        return self._before + time.time() - self._began


def counted_trials(study: SweepStudy) -> int:
    """The trials that count against ``budget.trials``: those that neither repeat another nor take its place."""
    return sum(not {"repeats", "parent"} & set(trial.user_attrs) for trial in study.frozen())
