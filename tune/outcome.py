"""What becomes of a trial that Ray Tune has let go of: it has ended as one of ``study.ENDS``, or it goes on later."""

import time
from pathlib import Path
from typing import Any

from tune.config import SweepConfig
from tune.group import last_words
from tune.memory import KERNEL, is_of_the_host, kernel_kills, said_of_memory
from tune.orders import Verdict
from tune.study import SweepStudy
from tune.trial import RESULT, WHERE
from workbench.files import read_record
from workbench.runs import Run

COSTS = ("seconds", "gpu_seconds")
"""Metrics that the sweep measures itself."""

ASK_SECONDS = 20.0
"""For a host to tell why a process on it has died."""


class Outcomes:
    """Writes down the ends of the trials of a sweep, whose folders are below ``folder``."""

    def __init__(self, config: SweepConfig, run: Run, study: SweepStudy, folder: Path) -> None:
        self._config, self._run, self._study, self._folder = config, run, study, folder

    def settle(
        self, number: int, last: dict[str, Any], result: dict[str, Any], death: str, verdict: Verdict | None
    ) -> bool:
        """Take note of the end of an attempt; whether the trial goes on in this session.

        ``last`` is its last look, ``result`` how it says that it ended, ``death`` what became of its process.
        """
        outcome, reason = result.get("outcome", "ended"), result.get("reason", "")
        if result.get("joules") is not None:
            self._study.during(number, joules=result["joules"])
        if death:
            outcome, reason = ("died", "") if verdict else self._of_death(number, death)
        if outcome in ("ended", "died") and verdict is not None and verdict.state != "paused":
            self._study.end(number, verdict.state, verdict.reason)
            self._run.say(f"trial {number} is {verdict.state}: {verdict.reason}")
            return False
        if outcome == "ended" or (outcome == "died" and verdict is not None):
            self._study.leave(number)
            self._run.say(f"trial {number} pauses after step {last.get('step', 0)}")
            return False
        if outcome == "died":
            return self._again(number, reason)
        if outcome == "does not fit" and self._once_more(number, reason, bool(death)):
            return True
        self._end(number, outcome, reason, last, result)
        return False

    def _of_death(self, number: int, death: str) -> tuple[str, str]:
        """What a dead process comes to: "died", or "does not fit" where memory has killed it."""
        if words := said_of_memory(death):
            return "does not fit", words
        if _killed_by_the_kernel(self._folder / str(number) / WHERE):
            return "does not fit", f"its host's {KERNEL} for want of memory meanwhile"
        return "died", last_words(death)

    def _again(self, number: int, reason: str) -> bool:
        """Whether a trial whose process died goes on: so often as it may, over all sessions."""
        self._study.during(number, died=reason, ended=time.time())
        died = sum("died" in attempt for attempt in self._study.trial(number).attempts)
        if died > self._config.retries:
            self._study.end(number, "failed", f"its process died {died} times, last: {reason}")
            self._run.say(f"trial {number} failed: its process died {died} times")
            return False
        self._run.say(f"trial {number} goes on from its last checkpoint: {reason}")
        return True

    def _once_more(self, number: int, reason: str, killed: bool) -> bool:
        """Whether a trial that ran out of memory is tried again, once: with more of a card's where that was too small,
        and where it was if its host's was and it was ``killed``, which others there may have been the cause of."""
        attempts = self._study.trial(number).attempts
        card = 0.0 if is_of_the_host(reason) else attempts[-1]["memory_gb"]
        if not (card or killed) or any(attempt.get("out_of_memory") for attempt in attempts):
            return False
        self._study.during(number, out_of_memory=True, outgrown_gb=card, ended=time.time())
        what, where = (f"its card's {card:g} GB", "with more") if card else ("memory", "once more")
        self._run.say(f"trial {number} ran out of {what}: it is tried {where}")
        return True

    def _end(self, number: int, outcome: str, reason: str, last: dict[str, Any], result: dict[str, Any]) -> None:
        facts = {key[6:]: value for key, value in result.items() if key.startswith("facts/")}
        kept = {key[5:]: value for key, value in facts.items() if key.startswith("kept/")}
        values = {name: value for name, value in {**last, **kept}.items() if name in self._config.metrics}
        self._study.during(number, ended=time.time())
        record = self._study.trial(number)
        values |= {"seconds": record.seconds, "gpu_seconds": record.gpu_seconds}
        if outcome == "finished" and not (self._folder / str(number) / RESULT).is_dir():
            outcome, reason = "failed", f"its result is not in {self._folder}: is that on storage that all hosts share?"
        self._study.end(number, outcome, reason, values, **facts)
        self._run.say(f"trial {number} {outcome}" + (f": {reason}" if reason else ""))
        numbers = {key: value for key, value in record.point.items() if isinstance(value, int | float)}
        if outcome == "finished":
            ended = sum(trial.ended for trial in self._study.trials())
            self._run.metrics(ended, **{**numbers, **values, "trial": number, "steps": record.steps})


def _killed_by_the_kernel(where: Path) -> bool:
    """Whether the kernel of a trial's host has killed for want of memory since the trial wrote ``where``; False where
    the host does not answer."""
    told = read_record(where)
    if not told:
        return False
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(told["node"], soft=False)
    asked = ray.remote(kernel_kills).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote()
    try:
        return bool(ray.get(asked, timeout=ASK_SECONDS) > told["kernel_kills"])
    except ray.exceptions.RayError:
        ray.cancel(asked, force=True)
        return False
