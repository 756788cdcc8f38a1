"""A host's time axis: its wall clock as it was at one moment, carried on by its steady clock, which nobody sets.

    clock = SteadyClock.start()
    clock.now()     # epoch seconds; a wall clock that is set meanwhile does not bend it
    clock.step()    # by how much the wall clock was set since

Hosts' clocks differ, so one host's is the reference, and the offset of each other is measured as NTP does it: of
several questions and answers the fastest tells most, and its error is at most half of its round trip.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from workbench.marks import steady

QUESTIONS = 8
STEP_SECONDS = 0.1
"""A wall clock that is further than this from the axis was set; an NTP daemon that slews it takes minutes for that."""


@dataclass(frozen=True)
class SteadyClock:
    """Epoch seconds ``wall`` were at ``monotonic``, since the host's start that ``boot`` names."""

    wall: float
    monotonic: float
    boot: str

    @classmethod
    def start(cls, before: Mapping[str, Any] | None = None) -> "SteadyClock":
        """A clock from now on, or the one of ``before`` if the host was not started again since."""
        boot = boot_name()
        if before and before.get("boot") == boot:
            return cls(before["wall"], before["monotonic"], boot)
        return cls(time.time(), steady(), boot)

    def at(self, monotonic: float) -> float:
        """Epoch seconds on the axis at a reading of the host's steady clock."""
        return self.wall + monotonic - self.monotonic

    def now(self) -> float:
        """Epoch seconds on the axis."""
        return self.at(steady())

    def step(self) -> float:
        """Seconds that the wall clock is ahead of the axis."""
        return time.time() - self.now()

    def to_json(self) -> dict[str, Any]:
        """For ``start`` in another process, and for readers of the recording."""
        return asdict(self)


def boot_name() -> str:
    """What changes when the host is started again, and with it the origin of its monotonic clock."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else f"{psutil.boot_time():.0f}"


def measure_offset(ask: Callable[[], float], clock: SteadyClock, questions: int = QUESTIONS) -> dict[str, float]:
    """The offset of the clock that ``ask`` reads: its seconds less ours, at ``time``, known to ``error`` seconds."""
    answers = []
    for _ in range(questions):
        asked = clock.now()
        theirs = ask()
        answered = clock.now()
        answers.append((answered - asked, theirs - (asked + answered) / 2, answered))
    round_trip, offset, when = min(answers)
    return {"time": when, "offset": offset, "error": round_trip / 2}
