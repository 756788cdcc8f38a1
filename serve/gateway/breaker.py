"""A circuit breaker for each engine, by ``pybreaker``: after faults in a row it refuses at once, then lets one try.

Nygard, *Release It!*. A request that ends with neither an answer nor a fault (its client left) counts for nothing.
"""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

import pybreaker

from serve.gateway.errors import breaker_open
from serve.gateway.settings import ModelPolicy


class Fault(Exception):
    """What the breaker counts."""


class Breaker:
    """The state of one engine as its answers show it; ``model`` is the engine's own name.

    ``changed`` is told whether it is open.
    """

    def __init__(self, model: str, policy: ModelPolicy, changed: Callable[[bool], None] = lambda _: None) -> None:
        self._model = model
        self._seconds = policy.breaker_seconds
        self._memory = pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)
        self._breaker = pybreaker.CircuitBreaker(
            policy.breaker_failures, policy.breaker_seconds, state_storage=self._memory, throw_new_error_on_trip=False
        )
        self._trying = False
        self._changed = changed
        self._changed(False)

    @property
    def is_open(self) -> bool:
        """Whether the last faults opened it and no request has succeeded since."""
        return bool(self._breaker.current_state != pybreaker.STATE_CLOSED)

    def enter(self) -> bool:
        """Let a request pass; whether it is the one that tries an engine thought broken.

        Raises ApiError 503 while the breaker is open or another request tries.
        """
        if not self.is_open:
            return False
        opened = self._memory.opened_at
        left = self._seconds - (datetime.now(UTC) - opened).total_seconds() if opened else 0.0
        if left > 0 or self._trying:
            raise breaker_open(self._model, max(left, 1.0))
        self._trying = True
        return True

    def leave(self, trying: bool) -> None:
        """The request that ``enter`` let pass has ended, however it did."""
        if trying:
            self._trying = False

    def answered(self) -> None:
        """The engine answered."""
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            self._breaker.call(lambda: None)
        self._changed(self.is_open)

    def failed(self) -> None:
        """The engine was at fault."""

        def fault() -> None:
            raise Fault

        with contextlib.suppress(Fault, pybreaker.CircuitBreakerError):
            self._breaker.call(fault)
        self._changed(self.is_open)
