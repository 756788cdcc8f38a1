"""What ends trials before their last step: the user, the clock, a target that is reached, the scheduler.

A trial is told by a file in its folder, which it looks for where it reports; one that has not ended in time is overdue.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tune.config import SweepConfig
from tune.purse import Purse
from tune.study import SweepStudy
from tune.trial import ORDER
from workbench.files import write_atomic
from workbench.runs import Run

POLL_SECONDS = 1.0
"""Between two looks at what the user has ordered."""

MOST_LOST = 10
"""Trials in a row without a result, after which a sweep whose trials are not counted pauses."""


@dataclass(frozen=True)
class Verdict:
    """A trial was told to end: as what, why, and when (seconds since 1970) it is overdue."""

    state: str
    reason: str
    until: float


class Orders:
    """Of the sweep whose trials' folders are in ``folder``; ``live`` are the numbers of those that run."""

    def __init__(
        self, config: SweepConfig, run: Run, study: SweepStudy, purse: Purse, folder: Path, live: Collection[int]
    ) -> None:
        self._config, self._run, self._study, self._purse = config, run, study, purse
        self._folder, self._live = folder, live
        self._verdicts: dict[int, Verdict] = {}
        self._looked = 0.0
        self._before = {trial.number for trial in study.trials() if trial.ended}
        self.paused = ""
        """Why the session ends with trials that are not finished."""

    def tell(self, number: int, state: str, reason: str) -> None:
        """Have a trial end as ``state``; one that was told before is told so again."""
        verdict = Verdict(state, reason, time.time() + self._config.grace_seconds)
        verdict = self._verdicts.setdefault(number, verdict)
        write_atomic(self._folder / str(number) / ORDER, verdict.reason)

    def tell_all(self, state: str, reason: str) -> None:
        """Have all end that run."""
        for number in list(self._live):
            self.tell(number, state, reason)

    def pause(self, why: str) -> None:
        """End the session; its trials go on in another."""
        self.paused = why
        self._run.say(f"the sweep pauses: {why}")
        self.tell_all("paused", why)

    def obey(self) -> None:
        """Look at what the user has ordered since, and at the clock."""
        if time.monotonic() - self._looked < POLL_SECONDS:
            return
        self._looked = time.monotonic()
        self._purse.sign_now_and_then()
        for number in self._study.note("stop", []):
            if number in self._live:
                self.tell(number, "stopped", "by the user")
        why = "the user has paused it" if self._study.note("pause") else self._purse.out_of_time() or self._in_vain()
        if why and not self.paused:
            self.pause(why)

    def _in_vain(self) -> str:
        """Why more trials would fail as all of this session's last ones have, where no number of trials ends them."""
        if self._purse.budget.trials is not None:
            return ""
        ended = [trial for trial in self._study.trials() if trial.ended and trial.number not in self._before]
        lost = [trial for trial in ended[-MOST_LOST:] if trial.state in ("failed", "diverged", "does not fit")]
        return (
            f"{MOST_LOST} trials in a row have no result, the last: {lost[-1].reason}" if len(lost) == MOST_LOST else ""
        )

    def look_at_target(self, number: int, step: int, value: float) -> None:
        """``value`` of the first metric may be good enough; then all but that trial end, each where it reports."""
        target = self._purse.budget.target
        if target is not None and not self._study.better(target, value) and not self._study.note("reached"):
            self._study.write_note("reached", {"trial": number, "step": step})
            self._run.say(f"trial {number} has reached the target {target:g}; the others end")
        if (reached := self._study.note("reached")) and reached["trial"] != number:
            self.tell(number, "stopped", f"trial {reached['trial']} had reached the target")

    def told(self, number: int) -> bool:
        """Whether the trial is to end; then its file is there, also for a process that has begun since."""
        if number not in self._verdicts:
            return False
        self.tell(number, "", "")
        return True

    def overdue(self, number: int) -> bool:
        """Whether it has had its time to write a checkpoint."""
        return number in self._verdicts and time.time() > self._verdicts[number].until

    def forget(self, number: int) -> Verdict | None:
        """The trial has ended; what it had been told."""
        return self._verdicts.pop(number, None)
