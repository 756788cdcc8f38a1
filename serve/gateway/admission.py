"""How many requests are at an engine at once, and how many may wait for it."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.gateway.errors import overloaded
from serve.gateway.settings import ModelPolicy


class Admission:
    """The places at one engine, of which each gateway replica has its share; ``model`` is the engine's own name.

    ``changed`` is told how many run and how many wait.
    """

    def __init__(
        self, model: str, policy: ModelPolicy, replicas: int, changed: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self._model = model
        self._queue = math.ceil(policy.queue / replicas)
        self._queue_timeout = policy.queue_timeout
        self._places = asyncio.Semaphore(math.ceil(policy.concurrency / replicas))
        self._changed = changed
        self.running = 0
        self.waiting = 0
        self._count()

    def _count(self, running: int = 0, waiting: int = 0) -> None:
        self.running += running
        self.waiting += waiting
        self._changed(self.running, self.waiting)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Hold a place; gives the seconds waited for it. Raises ApiError 503 where the queue is full or too slow."""
        begun = time.perf_counter()
        if self._places.locked() and self.waiting >= self._queue:
            raise overloaded(self._model, f"{self.running} requests run and {self.waiting} wait")
        self._count(waiting=1)
        try:
            async with asyncio.timeout(self._queue_timeout):
                await self._places.acquire()
        except TimeoutError:
            raise overloaded(self._model, f"no place within {self._queue_timeout:g} s") from None
        finally:
            self._count(waiting=-1)
        self._count(running=1)
        try:
            yield time.perf_counter() - begun
        finally:
            self._count(running=-1)
            self._places.release()
