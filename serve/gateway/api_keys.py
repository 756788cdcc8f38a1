"""API keys: who owns one, what it may use and how much of it. Stored by the digest of the key, never the key.

store = open_store("sqlite:///runs/.secrets/gateway.db")
secret = await store.add(ApiKey.new("alice", models=["tuned"], requests_per_minute=60))
"""

import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from serve.keys import PREFIX, digest
from workbench.errors import UserError


@dataclass(frozen=True)
class ApiKey:
    """One key; a limit of 0 is none. ``budget`` is in the prices' currency for a calendar month (UTC)."""

    id: str
    digest: str
    owner: str
    models: list[str] = field(default_factory=list)
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    budget: float = 0.0
    created: float = 0.0

    def allows(self, model: str) -> bool:
        """Whether the key may use ``model``; without a list it may use all."""
        return not self.models or model in self.models

    def row(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class Usage:
    """What a key has used in a month."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class KeyStore(Protocol):
    """Where the keys and their use are kept, for all replicas and over restarts."""

    uri: str

    async def find(self, key_digest: str) -> ApiKey | None:
        """The key with this digest that is not revoked."""

    async def add(self, key: ApiKey) -> None:
        """Keep a key; one of the same digest is replaced."""

    async def revoke(self, key_id: str) -> bool:
        """Forget the key with this id; whether there was one."""

    async def keys(self) -> list[ApiKey]:
        """All keys, oldest first."""

    async def charge(self, key_id: str, month: str, used: Usage) -> None:
        """Add to what a key has used in ``month`` (YYYY-MM)."""

    async def usage(self, key_id: str, month: str) -> Usage:
        """What a key has used in ``month``."""

    async def owe(self, name: str, seconds: float) -> None:
        """Add to a debt, which time pays off: one second of it each second."""

    async def owed(self, name: str) -> float:
        """The seconds until a debt is paid off; 0 for none."""

    async def alive(self) -> bool:
        """Whether the store answers."""

    async def close(self) -> None:
        """Let go of connections."""


def new_key(owner: str, **limits: Any) -> tuple[ApiKey, str]:
    """A new random key and its secret, which is shown once and kept nowhere."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return key_of(secret, owner, **limits), secret


def key_of(secret: str, owner: str, **limits: Any) -> ApiKey:
    """The record of a secret that exists. Its id is the beginning of its digest."""
    hashed = digest(secret)
    return ApiKey(id=hashed[:12], digest=hashed, owner=owner, created=time.time(), **limits)


def month(at: float) -> str:
    """The calendar month (UTC) of a Unix time, as YYYY-MM."""
    return time.strftime("%Y-%m", time.gmtime(at))


def open_store(uri: str) -> KeyStore:
    """The store at ``uri``: ``sqlite:///FILE`` or ``redis://HOST:PORT/DB``.

    Raises UserError for any other, or for a file that others may read.
    """
    if uri.startswith("sqlite:///"):
        from serve.gateway.sqlite_store import SqliteStore

        return SqliteStore(uri)
    if uri.startswith(("redis://", "rediss://")):
        from serve.gateway.redis_store import RedisStore

        return RedisStore(uri)
    raise UserError(f"store: {uri.split('@')[-1]} is neither sqlite:///FILE nor redis://HOST:PORT/DB")
