"""The two ways to an engine: the OpenAI application in this process, and another OpenAI-compatible server.

Both give a reply as its status, its headers and an iterator over its body, and both abort the engine's work when the
reply is left before its end.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from serve.gateway.settings import Upstream
from serve.keys import read_key

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

Headers = list[tuple[bytes, bytes]]
HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server", b"content-encoding"}
CONNECT_SECONDS = 5.0
log = logging.getLogger("workbench.gateway")


@dataclass(frozen=True)
class Call:
    """What is sent to an engine."""

    method: str
    path: str
    body: bytes
    headers: Headers


@dataclass
class Reply:
    """What comes back."""

    status: int
    headers: Headers
    body: AsyncIterator[bytes]


class EngineLost(Exception):
    """The engine cannot be reached, or ended in the middle of its reply."""


class Engine(Protocol):
    """A place that answers OpenAI requests."""

    def send(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send and wait for the head of the reply. Raises EngineLost, also while the body is read."""

    async def models(self) -> list[dict[str, Any]]:
        """Its models in OpenAI's form."""

    async def ready(self, model: str) -> bool:
        """Whether it would answer for ``model``."""


class InsideEngine:
    """The ASGI application under the gateway, called in this process."""

    def __init__(self, app: "ASGIApp", healthy: Callable[[str], bool]) -> None:
        self._app = app
        self._healthy = healthy

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        """Run the application for one request; it is cancelled when the block is left."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = False

        async def receive() -> "Message":
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: "Message") -> None:
            messages.put_nowait(message)

        async def body() -> AsyncIterator[bytes]:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.body":
                    if data := message.get("body", b""):
                        yield data
                    if not message.get("more_body", False):
                        return
            raise EngineLost("the application ended without an end of its answer")

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method, "scheme": "http",
            "path": call.path, "raw_path": call.path.encode(), "root_path": "", "query_string": b"",
            "headers": call.headers, "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip

        async def serve() -> None:
            try:
                with children_cancelled():
                    await self._app(scope, receive, send)
            except Exception:
                log.exception("the application failed")
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(serve())
        try:
            head = await messages.get()
            if head is None:
                raise EngineLost("the application gave no answer")
            yield Reply(head["status"], list(head["headers"]), body())
        finally:
            gone.set()
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)  # an application that does not heed it keeps nobody waiting

    async def models(self) -> list[dict[str, Any]]:
        """The application's own list."""
        import orjson

        async with self.send(Call("GET", "/v1/models", b"", [])) as reply:
            found = orjson.loads(b"".join([part async for part in reply.body]))
        return list(found["data"])

    async def ready(self, model: str) -> bool:
        """Whether Ray Serve calls the model's deployment healthy."""
        return await asyncio.to_thread(self._healthy, model)


@contextlib.contextmanager
def children_cancelled() -> Any:
    """Cancel what this task asked of other Serve deployments when it is cancelled itself.

    Serve does so when the client of the whole request leaves, not when one of several attempts is given up: each
    attempt therefore counts as a request of its own. Outside a Serve replica this does nothing.
    """
    import sys

    context = sys.modules.get("ray.serve.context")
    if context is None:
        yield
        return
    import dataclasses
    import uuid

    mine = uuid.uuid4().hex
    request = dataclasses.replace(
        context._get_serve_request_context(), _internal_request_id=mine, cancel_on_parent_request_cancel=True
    )
    context._serve_request_context.set(request)
    try:
        yield
    except BaseException:
        for task in list(context._get_requests_pending_assignment(mine).values()):
            task.get_loop().call_soon_threadsafe(task.cancel)  # the router has a loop of its own
        for result in list(context._get_in_flight_requests(mine).values()):
            result.cancel()
        raise


class HttpEngine:
    """Another OpenAI-compatible server."""

    def __init__(self, name: str, upstream: Upstream) -> None:
        self._name = name
        self._url = upstream.base_url.rstrip("/").removesuffix("/v1")
        self._there = upstream.model or name
        self._key = read_key(upstream.api_key_file) if upstream.api_key_file else None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # the gateway has its own for everything else
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout)

    @property
    def model_there(self) -> str:
        """The model's name at the other server."""
        return self._there

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        """Send over HTTP; the connection is closed when the block is left early, which aborts the work there."""
        request = self._client.build_request(
            call.method, self._url + call.path, content=call.body, headers=[*call.headers, *self._authorization()]
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise EngineLost(f"{type(error).__name__}: {error}") from None

        async def body() -> AsyncIterator[bytes]:
            try:
                async for part in response.aiter_bytes():
                    yield part
            except httpx.HTTPError as error:
                raise EngineLost(f"{type(error).__name__}: {error}") from None

        try:
            yield Reply(response.status_code, list(response.headers.raw), body())
        finally:
            await response.aclose()

    def _authorization(self) -> Headers:
        return [(b"authorization", f"Bearer {self._key}".encode())] if self._key else []

    async def models(self) -> list[dict[str, Any]]:
        """One model, under the name it has here."""
        return [{"id": self._name, "object": "model", "created": 0, "owned_by": "upstream"}]

    async def ready(self, model: str) -> bool:
        """Whether the server lists models within a short time."""
        headers = dict(self._authorization())
        try:
            answer = await self._client.get(f"{self._url}/v1/models", headers=headers, timeout=CONNECT_SECONDS)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200
