"""What a request costs: its share of the time that the engine's cards were in use.

While n requests run, each bears 1/n of every second. This is the virtual time of processor sharing (Kleinrock, 1967):
V grows by dt / n, a request costs what V grew while it ran, and the costs of all sum to the time in use.
"""

import time
from collections.abc import Callable


class Meter:
    """The virtual time of one engine."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._running = 0
        self._virtual = 0.0
        self._at = clock()

    def start(self) -> float:
        """A request starts; the virtual time then, for ``stop``."""
        self._advance()
        self._running += 1
        return self._virtual

    def stop(self, started: float) -> float:
        """The request ends; the seconds of use that it bears."""
        self._advance()
        self._running -= 1
        return self._virtual - started

    def _advance(self) -> None:
        now = self._clock()
        if self._running:
            self._virtual += (now - self._at) / self._running
        self._at = now
