"""Keys and their use in Redis, for gateway replicas on several hosts."""

from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from serve.gateway.api_keys import ApiKey, Usage

KEYS = "workbench:keys"
USAGE = "workbench:usage"
OWED = "workbench:owed"
OWE = """
local time = redis.call('time')
local now = time[1] + time[2] / 1e6
local left = math.max(redis.call('get', KEYS[1]) or 0, now) + ARGV[1] - now
if tonumber(ARGV[1]) > 0 then
    redis.call('set', KEYS[1], string.format('%.6f', now + left), 'PX', math.ceil(left * 1000))
end
return string.format('%.6f', left)
"""
"""Adds ARGV[1] seconds to the debt KEYS[1], kept as the Unix time at which it is paid off; the seconds until then."""
COUNTS = ("requests", "prompt_tokens", "completion_tokens")
SECONDS = 2.0
"""An answer of Redis takes no longer, or counts as none."""


class RedisStore:
    """Keys are fields of one hash, by digest; the use of a key in a month is a hash of its own."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._redis: Any = Redis.from_url(uri, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
        self._owe: Any = self._redis.register_script(OWE)

    async def find(self, key_digest: str) -> ApiKey | None:
        """The key with this digest."""
        record = await self._redis.hget(KEYS, key_digest)
        return ApiKey(**orjson.loads(record)) if record else None

    async def add(self, key: ApiKey) -> None:
        """Keep a key."""
        await self._redis.hset(KEYS, key.digest, orjson.dumps(key.row()))

    async def revoke(self, key_id: str) -> bool:
        """Forget a key."""
        return bool(await self._redis.hdel(KEYS, *[k.digest for k in await self.keys() if k.id == key_id] or [""]))

    async def keys(self) -> list[ApiKey]:
        """All keys, oldest first."""
        found = [ApiKey(**orjson.loads(record)) for record in await self._redis.hvals(KEYS)]
        return sorted(found, key=lambda key: key.created)

    async def charge(self, key_id: str, month: str, used: Usage) -> None:
        """Add to what a key has used."""
        name = f"{USAGE}:{month}:{key_id}"
        async with self._redis.pipeline(transaction=True) as pipe:
            for field in COUNTS:
                pipe.hincrby(name, field, getattr(used, field))
            pipe.hincrbyfloat(name, "cost", used.cost)
            await pipe.execute()

    async def usage(self, key_id: str, month: str) -> Usage:
        """What a key has used in a month."""
        found = {
            name.decode(): value for name, value in (await self._redis.hgetall(f"{USAGE}:{month}:{key_id}")).items()
        }
        requests, prompt, completion = (int(found.get(name, 0)) for name in COUNTS)
        return Usage(requests, prompt, completion, float(found.get("cost", 0)))

    async def owe(self, name: str, seconds: float) -> None:
        """Add to a debt."""
        await self._owe([f"{OWED}:{name}"], [seconds])

    async def owed(self, name: str) -> float:
        """The seconds until a debt is paid off; 0 for none."""
        return float(await self._owe([f"{OWED}:{name}"], [0]))

    async def alive(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(await self._redis.ping())
        except (RedisError, OSError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
