"""The gateway's embedded store: keys, their use, the counters of limits, and what happens while another writes."""

import asyncio
import sqlite3
import stat
from pathlib import Path

import pytest
from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from serve.gateway.api_keys import Usage, key_of, new_key, open_store
from serve.gateway.errors import ApiError
from serve.gateway.quota import Quota
from serve.gateway.sqlite_store import SqliteCounters
from workbench.errors import UserError


def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gateway.db'}"


# Keys


def test_a_key_is_found_by_its_digest_until_it_is_revoked(tmp_path: Path) -> None:
    async def work() -> None:
        store, other = open_store(uri(tmp_path)), open_store(uri(tmp_path))  # two replicas
        key, secret = new_key("alice", models=["tuned"], requests_per_minute=5)
        await store.add(key)
        assert await other.find(key.digest) == key
        assert secret not in (tmp_path / "gateway.db").read_bytes().decode("latin-1")
        assert await store.revoke(key.id)
        assert await other.find(key.digest) is None
        assert not await store.revoke(key.id)

    asyncio.run(work())


def test_the_use_of_a_key_adds_up_over_replicas_and_restarts(tmp_path: Path) -> None:
    async def work() -> None:
        for _ in range(3):
            store = open_store(uri(tmp_path))
            await store.charge("k", "2026-11", Usage(1, 10, 5, 0.25))
            await store.close()
        assert await open_store(uri(tmp_path)).usage("k", "2026-11") == Usage(3, 30, 15, 0.75)
        assert await open_store(uri(tmp_path)).usage("k", "2026-12") == Usage()

    asyncio.run(work())


def test_a_store_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    open_store(uri(tmp_path))
    assert stat.S_IMODE((tmp_path / "gateway.db").stat().st_mode) == 0o600
    (tmp_path / "gateway.db").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        open_store(uri(tmp_path))


def test_a_store_that_is_no_database_or_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gateway.db").write_bytes(b"x" * 5000)
    (tmp_path / "gateway.db").chmod(0o600)
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(uri(tmp_path))
    with pytest.raises(UserError, match="neither sqlite"):
        open_store("mysql://user:secret@host/db")


# Counters


def test_the_counters_let_in_as_many_as_the_limit_and_are_shared(tmp_path: Path) -> None:
    async def work() -> list[bool]:
        limiters = [SlidingWindowCounterRateLimiter(SqliteCounters(f"async+{uri(tmp_path)}")) for _ in range(2)]
        return [await limiters[i % 2].hit(RateLimitItemPerMinute(5), "requests", "k") for i in range(8)]

    assert asyncio.run(work()) == [True] * 5 + [False] * 3


def test_half_of_the_last_window_counts_half_way_through_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.0  # the beginning of a minute
    monkeypatch.setattr("time.time", lambda: now)
    item = RateLimitItemPerMinute(10)

    async def work() -> int:
        nonlocal now
        limiter = SlidingWindowCounterRateLimiter(SqliteCounters(f"async+{uri(tmp_path)}"))
        assert all([await limiter.hit(item, "k") for _ in range(10)])
        now += 90.0
        return sum([await limiter.hit(item, "k") for _ in range(10)])

    assert asyncio.run(work()) == 5


def test_tokens_past_the_limit_are_waited_for_at_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    key = key_of("wb-x", "alice", tokens_per_minute=10)
    left = b"x-ratelimit-remaining-tokens"

    async def work() -> None:
        nonlocal now
        quotas = [Quota(open_store(uri(tmp_path))) for _ in range(2)]  # two replicas
        for _ in range(50):
            assert (left, b"10") in await quotas[0].admit(key)  # all at once
        await asyncio.gather(*(quotas[i % 2].charge(key, Usage(1, 7, 5)) for i in range(50)))
        for waited in (0, 61, 3400):  # 600 tokens are 3600 s; with less than 54 s left there is room for one
            now = 1_800_000_000.0 + waited
            with pytest.raises(ApiError) as refused:
                await quotas[0].admit(key)
            assert refused.value.retry_after == pytest.approx(3546 - waited)
        now = 1_800_000_000.0 + 3546.5
        assert (left, b"1") in await quotas[1].admit(key)
        now += 1000.0
        assert (left, b"10") in await quotas[1].admit(key)  # no more than a minute's are saved up

    asyncio.run(work())


def test_over_an_hour_a_key_that_always_asks_gets_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    key = key_of("wb-x", "alice", tokens_per_minute=100)

    async def work() -> int:
        nonlocal now
        quota, used = Quota(open_store(uri(tmp_path))), 0
        while now < 1_800_000_000.0 + 3600:
            try:
                await quota.admit(key)
            except ApiError:
                now += 5.0
            else:
                await quota.charge(key, Usage(1, 200, 37))
                used += 237
        return used

    assert 60 * 100 <= asyncio.run(work()) <= 61 * 100 + 237


# A lock


def test_while_another_process_writes_the_loop_goes_on_and_the_write_is_made_after_it(tmp_path: Path) -> None:
    async def work() -> None:
        store = open_store(uri(tmp_path))
        counters = SqliteCounters(f"async+{uri(tmp_path)}")
        other = sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)
        other.execute("begin immediate")
        writes = [
            asyncio.create_task(store.charge("k", "2026-11", Usage(1, 10, 5, 0.25))),
            asyncio.create_task(counters.acquire_sliding_window_entry("k", 5, 60)),
        ]
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert await store.find("nobody") is None  # readers do not wait
        assert not any(write.done() for write in writes)
        other.execute("commit")
        await asyncio.gather(*writes)
        assert await store.usage("k", "2026-11") == Usage(1, 10, 5, 0.25)

    asyncio.run(work())


def test_a_lock_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.sqlite_store.BUSY_SECONDS", 0.05)
    store = open_store(uri(tmp_path))
    other = sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        asyncio.run(store.charge("k", "2026-11", Usage(1, 10, 5, 0.25)))
