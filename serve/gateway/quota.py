"""What a key may still use: requests and tokens a minute, and a budget for a month.

Requests are counted before they run, by the ``limits`` library in a window that slides. Tokens and cost are known
after: a request is let in while there is something left, and what it used is charged then. Tokens are a leaky bucket
that holds a minute's (the generic cell rate algorithm, ITU-T I.371): what a key has in flight can pass the bucket's
edge, and the key then waits until as much has leaked out that there is room again.
"""

import calendar
import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string

from serve.gateway.api_keys import ApiKey, KeyStore, Usage, month
from serve.gateway.errors import over_limit

MINUTE = 60.0
SWEEP = 1000
"""Charges after which counters that have expired are deleted; Redis does so itself."""


def counters(uri: str) -> Storage:
    """The library's storage beside the keys' store."""
    if uri.startswith("sqlite:"):
        from serve.gateway.sqlite_store import SqliteCounters

        return SqliteCounters(f"async+{uri}")
    storage = storage_from_string(f"async+{uri}", implementation="redispy", socket_timeout=2.0)
    assert isinstance(storage, Storage)
    return storage


class Quota:
    """The limits of all keys."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._counters = storage = counters(store.uri)
        self._charges = 0
        self._requests = SlidingWindowCounterRateLimiter(storage)

    async def admit(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        """Count a request of ``key``; headers that tell what is left. Raises ApiError 429 where nothing is."""
        headers: list[tuple[bytes, bytes]] = []
        if key.budget:
            now = time.time()
            spent = (await self._store.usage(key.id, month(now))).cost
            if spent >= key.budget:
                message = f"This key has spent its budget of {key.budget:g} for the month."
                raise over_limit(message, _next_month(now) - now, "insufficient_quota")
        if key.tokens_per_minute:
            token = MINUTE / key.tokens_per_minute
            room = MINUTE - await self._store.owed(_tokens(key))
            if room < token:
                message = f"This key has used its {key.tokens_per_minute} tokens a minute."
                raise over_limit(message, token - room)
            headers += _told("tokens", key.tokens_per_minute, int(room * key.tokens_per_minute / MINUTE))
        if key.requests_per_minute:
            item = RateLimitItemPerMinute(key.requests_per_minute)
            let_in = await self._requests.hit(item, "requests", key.id)
            stats = await self._requests.get_window_stats(item, "requests", key.id)
            if not let_in:
                message = f"This key has used its {key.requests_per_minute} requests a minute."
                raise over_limit(message, stats.reset_time - time.time())
            headers += _told("requests", key.requests_per_minute, stats.remaining)
        return headers

    async def charge(self, key: ApiKey, used: Usage) -> None:
        """Note what a request of ``key`` has used."""
        tokens = used.prompt_tokens + used.completion_tokens
        if key.tokens_per_minute and tokens:
            await self._store.owe(_tokens(key), tokens * MINUTE / key.tokens_per_minute)
        await self._store.charge(key.id, month(time.time()), used)
        self._charges += 1
        if self._charges % SWEEP == 0 and hasattr(self._counters, "sweep"):
            await self._counters.sweep()


def _tokens(key: ApiKey) -> str:
    return f"tokens/{key.id}"


def _told(what: str, limit: int, remaining: int) -> list[tuple[bytes, bytes]]:
    return [
        (f"x-ratelimit-limit-{what}".encode(), str(limit).encode()),
        (f"x-ratelimit-remaining-{what}".encode(), str(max(remaining, 0)).encode()),
    ]


def _next_month(at: float) -> float:
    now = time.gmtime(at)
    year, following = (now.tm_year + 1, 1) if now.tm_mon == 12 else (now.tm_year, now.tm_mon + 1)
    return calendar.timegm((year, following, 1, 0, 0, 0, 0, 0, 0))
