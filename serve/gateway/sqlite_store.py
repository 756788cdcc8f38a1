"""Keys, their use and the counters of their limits in one SQLite file, shared by the processes of one host.

Write-ahead logging lets readers go on while another process writes (https://sqlite.org/wal.html, which also says why
all of them must be on one host). A statement takes tens of microseconds, so it is made on the event loop, which goes on
while another process holds the lock: SQLite's own waiting would stop every request of this process.
"""

import asyncio
import contextlib
import functools
import os
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import orjson
from limits.aio.storage import SlidingWindowCounterSupport, Storage
from limits.storage.base import TimestampedSlidingWindow

from serve.gateway.api_keys import ApiKey, Usage
from workbench.errors import UserError

TABLES = """
create table if not exists keys (digest text primary key, id text unique, created real, record text);
create table if not exists usage (id text, month text, requests int, prompt_tokens int, completion_tokens int,
    cost real, primary key (id, month)) without rowid;
create table if not exists counters (name text primary key, value int, expires real) without rowid;
"""
BUSY_SECONDS = 5.0
"""A writer waits so long for another process that writes."""
BUSY_PAUSE = 0.005
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def patient(write: Callable[Given, Coroutine[Any, Any, Answer]]) -> Callable[Given, Coroutine[Any, Any, Answer]]:
    """``write``, tried again for ``BUSY_SECONDS`` while another process writes; then sqlite3.OperationalError."""

    @functools.wraps(write)
    async def tried(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        ends = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return await write(*args, **kwargs)
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                    raise
            await asyncio.sleep(BUSY_PAUSE)

    return tried


def connect(uri: str) -> sqlite3.Connection:
    """The database at ``sqlite:///FILE``, made 0600 if absent. Raises UserError where it cannot be opened."""
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Only a file that is not there yet: to close a descriptor of a database drops the locks of this process'
        # other connections to it, and a process that then takes itself for the last one deletes their log.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if path.stat().st_mode & 0o077:
            raise UserError(f"the gateway's store {path} is open to others: chmod 600 {path}")
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        database.execute("pragma journal_mode=wal")
        database.execute("pragma synchronous=normal")
        database.executescript(TABLES)
        database.execute("pragma busy_timeout=0")  # from here on `patient` waits
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"the gateway's store {path} cannot be opened: {error}") from None
    return database


class SqliteStore:
    """The keys and their use."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._database = connect(uri)

    async def find(self, key_digest: str) -> ApiKey | None:
        """The key with this digest."""
        row = self._database.execute("select record from keys where digest = ?", (key_digest,)).fetchone()
        return ApiKey(**orjson.loads(row[0])) if row else None

    @patient
    async def add(self, key: ApiKey) -> None:
        """Keep a key."""
        self._database.execute(
            "insert or replace into keys values (?, ?, ?, ?)",
            (key.digest, key.id, key.created, orjson.dumps(key.row()).decode()),
        )

    @patient
    async def revoke(self, key_id: str) -> bool:
        """Forget a key."""
        return self._database.execute("delete from keys where id = ?", (key_id,)).rowcount > 0

    async def keys(self) -> list[ApiKey]:
        """All keys, oldest first."""
        rows = self._database.execute("select record from keys order by created").fetchall()
        return [ApiKey(**orjson.loads(record)) for (record,) in rows]

    @patient
    async def charge(self, key_id: str, month: str, used: Usage) -> None:
        """Add to what a key has used."""
        self._database.execute(
            "insert into usage values (?, ?, ?, ?, ?, ?) on conflict (id, month) do update set "
            "requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens, cost = cost + excluded.cost",
            (key_id, month, used.requests, used.prompt_tokens, used.completion_tokens, used.cost),
        )

    async def usage(self, key_id: str, month: str) -> Usage:
        """What a key has used in a month."""
        row = self._database.execute(
            "select requests, prompt_tokens, completion_tokens, cost from usage where id = ? and month = ?",
            (key_id, month),
        ).fetchone()
        return Usage(*row) if row else Usage()

    @patient
    async def owe(self, name: str, seconds: float) -> None:
        """Add to a debt: a counter that expires when it is paid off."""
        now = time.time()
        self._database.execute(
            "insert into counters values (?1, 0, ?2 + ?3) on conflict (name) do update set "
            "expires = max(expires, ?2) + ?3",
            (name, now, seconds),
        )

    async def owed(self, name: str) -> float:
        """The seconds until a debt is paid off; 0 for none."""
        row = self._database.execute("select expires from counters where name = ?", (name,)).fetchone()
        return max(float(row[0]) - time.time(), 0.0) if row else 0.0

    async def alive(self) -> bool:
        """Whether the file can be read."""
        try:
            self._database.execute("select count(*) from keys").fetchone()
        except sqlite3.Error:
            return False
        return True

    async def close(self) -> None:
        """Close the file."""
        self._database.close()


class SqliteCounters(Storage, SlidingWindowCounterSupport, TimestampedSlidingWindow):
    """A storage of the ``limits`` library, which has none that is both embedded and kept."""

    STORAGE_SCHEME = ["async+sqlite"]  # noqa: RUF012 (the library's registry wants a plain list)

    def __init__(self, uri: str, **options: float | str | bool) -> None:
        super().__init__(uri, wrap_exceptions=False)
        self._database = connect(uri.removeprefix("async+"))

    @property
    def base_exceptions(self) -> type[Exception]:
        """What the storage may raise."""
        return sqlite3.Error

    @patient
    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to a counter, which starts anew when it has expired; its value."""
        now = time.time()
        row = self._database.execute(
            "insert into counters values (?1, ?2, ?4) on conflict (name) do update set "
            "value = case when expires <= ?3 then 0 else value end + ?2, "
            "expires = case when expires <= ?3 then ?4 else expires end returning value",
            (key, amount, now, now + expiry),
        ).fetchone()
        return int(row[0])

    async def get(self, key: str) -> int:
        """A counter's value, 0 for one that is not there or has expired."""
        found = self._database.execute("select value from counters where name = ? and expires > ?", (key, time.time()))
        row = found.fetchone()
        return int(row[0]) if row else 0

    async def get_expiry(self, key: str) -> float:
        """The Unix time at which a counter expires; now for one that is not there."""
        row = self._database.execute("select expires from counters where name = ?", (key,)).fetchone()
        return max(float(row[0]), time.time()) if row else time.time()

    async def check(self) -> bool:
        """Whether the file answers."""
        self._database.execute("select 1").fetchone()
        return True

    @patient
    async def reset(self) -> int:
        """Forget all counters; how many there were."""
        return self._database.execute("delete from counters").rowcount

    @patient
    async def clear(self, key: str) -> None:
        """Forget one counter."""
        self._database.execute("delete from counters where name = ?", (key,))

    @patient
    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count ``amount`` unless this window and the weighted one before it would pass ``limit``."""
        self._database.execute("begin immediate")  # no other process may count between the look and the count
        try:
            previous, previous_left, current, _ = await self.get_sliding_window(key, expiry)
            fits = previous * previous_left / expiry + current + amount <= limit
            if fits:
                _, now_key = self.sliding_window_keys(key, expiry, time.time())
                await self.incr(now_key, 2 * expiry, amount)
            return fits
        finally:
            self._database.execute("commit")

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """The previous window's count and seconds left, then the current one's."""
        now = time.time()
        before_key, now_key = self.sliding_window_keys(key, expiry, now)
        left = expiry - now % expiry
        return await self.get(before_key), left, await self.get(now_key), left + expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Forget both windows."""
        for name in self.sliding_window_keys(key, expiry, time.time()):
            await self.clear(name)

    @patient
    async def sweep(self) -> None:
        """Delete counters that have expired."""
        self._database.execute("delete from counters where expires <= ?", (time.time(),))
