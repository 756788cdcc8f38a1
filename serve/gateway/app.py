"""The gateway as ASGI middleware: the outermost layer of the ingress, so that nothing behind it is reached round it.

    app.add_middleware(Gateway, settings=GatewayConfig(...), healthy=..., base={"adapter": "model"})

Without a key only ``/health``, ``/ready`` and the page ``/chat`` answer. With one the OpenAI endpoints go through
``relay``, ``/metrics`` and ``/v1/feedback`` are the gateway's own, and everything else is 404.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from serve.gateway import access_log
from serve.gateway.api_keys import ApiKey, KeyStore, Usage, open_store
from serve.gateway.asgi import ClientGone, answer, read_body, read_form, send_error, send_page, until_gone
from serve.gateway.engines import InsideEngine
from serve.gateway.errors import (
    JSON,
    ApiError,
    bad_request,
    model_forbidden,
    model_unknown,
    no_route,
    store_down,
    wrong_key,
)
from serve.gateway.exchange import Exchange, new_ids, parse
from serve.gateway.lines import Lines
from serve.gateway.metrics import Metrics
from serve.gateway.quota import Quota
from serve.gateway.relay import marks, relay
from serve.gateway.routes import variant
from serve.gateway.settings import GatewayConfig
from serve.keys import digest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve.gateway.rag import Rag
    from serve.gateway.record import Recorder

RAG = "/v1/rag/chat/completions"
RELAYED = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score", "/v1/audio/transcriptions", "/tokenize",
     "/detokenize", RAG}
)  # fmt: skip
log = logging.getLogger("workbench.gateway")


class State:
    """What a gateway process holds open."""

    def __init__(self, settings: GatewayConfig, inside: InsideEngine | None, base: Mapping[str, str]) -> None:
        self.store: KeyStore = open_store(settings.store)
        self.quota = Quota(self.store)
        self.metrics = Metrics()
        self.lines = Lines(settings, inside, base, self.metrics)
        self.logger = access_log.open_log(settings.log_file)
        self.recorder = _recorder(settings)
        self.texts = settings.log_text or (settings.record.folder is not None and settings.record.text)
        self.later: set[asyncio.Task[None]] = set()
        self.rag = _rag(settings, self.lines)


class Gateway:
    """The middleware. Its state is made at the first request, because Serve sends it to its process by pickle."""

    def __init__(
        self, app: "ASGIApp | None", settings: GatewayConfig, healthy: Callable[[str], bool] = lambda model: True,
        base: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._app = app
        self._settings = settings
        self._healthy = healthy
        self._base = base or {}
        self._state: State | None = None

    @property
    def state(self) -> State:
        """The open store, the lines and the metrics."""
        if self._state is None:
            inside = InsideEngine(self._app, self._healthy) if self._app else None
            self._state = State(self._settings, inside, self._base)
        return self._state

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request; refuse a WebSocket; hand on the lifespan."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _lifespan(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def watched() -> Any:
            message = await receive()
            if message["type"] == "lifespan.startup":
                _ = self.state  # what cannot be opened is told before the first request
            elif message["type"] == "lifespan.shutdown":
                await self.close()
            return message

        if self._app is not None:
            await self._app(scope, watched, send)
            return
        while (await watched())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def close(self) -> None:
        """Write down what waits to be written."""
        if self._state is not None:
            await asyncio.gather(*self._state.later, return_exceptions=True)
            if self._state.recorder:
                await self._state.recorder.flush()

    async def _http(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Everything that an answer passes, errors in OpenAI's shape included."""
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        owner = "none"
        try:
            if path == "/health":
                await answer(noted, 200, {"status": "ok"})
                return
            if path == "/chat" and scope["method"] == "GET":
                await send_page(noted)
                return
            key = await self._key(scope)
            if path == "/ready":
                await self._ready(noted, key)
                return
            if key is None:
                raise wrong_key()
            owner = key.owner
            await self._dispatch(scope, receive, noted, path, key)
        except ApiError as error:
            if not error.counted:
                self.state.metrics.refused(owner, error.kind)
            await send_error(noted, error)
        except ClientGone:
            return
        except Exception:
            log.exception("%s %s", scope["method"], path)
            if begun:
                raise
            await send_error(noted, ApiError(500, "The gateway failed.", "internal_error", "server_error"))

    async def _key(self, scope: "Scope") -> ApiKey | None:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, token = given[0].decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return None
        try:
            return await self.state.store.find(digest(token.strip()))
        except Exception:
            log.exception("the store of keys does not answer")
            raise store_down() from None

    async def _admit(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        try:
            return await self.state.quota.admit(key)
        except ApiError:
            raise
        except Exception:
            log.exception("the store of limits does not answer")
            raise store_down() from None

    async def _dispatch(self, scope: "Scope", receive: "Receive", send: "Send", path: str, key: ApiKey) -> None:
        method = scope["method"]
        if path == RAG and self.state.rag is None:
            raise ApiError(404, "There are no documents here: gateway.rag.uri is not set.", "rag_off")
        if method == "POST" and path in RELAYED:
            await self._relayed(scope, receive, send, path, key)
        elif method == "GET" and path == "/v1/models":
            cards = [card for name, card in (await self.state.lines.cards()).items() if key.allows(name)]
            await answer(send, 200, {"object": "list", "data": cards})
        elif method == "GET" and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            card = (await self.state.lines.cards()).get(name) if key.allows(name) else None
            if card is None:
                raise model_unknown(name)
            await answer(send, 200, card)
        elif method == "GET" and path == "/metrics":
            if not key.allows(path):
                raise model_forbidden(path)
            text = self.state.metrics.render()
            await answer(send, 200, text, (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"))
        elif method == "GET" and path == "/openapi.json":
            from serve.gateway.openapi import SCHEMA

            await answer(send, 200, SCHEMA)
        elif method == "POST" and path == "/v1/feedback":
            await self._feedback(scope, receive, send, key)
        else:
            raise no_route(path)

    async def _ready(self, send: "Send", key: ApiKey | None) -> None:
        """200 while some model answers; with a key, which do."""
        state = self.state
        names = [name for name in await _quietly(state.lines.cards()) if name not in self._settings.routes]
        lines = [await state.lines.line(name) for name in names]
        found = await asyncio.gather(*(line.engine.ready(line.model) for line in lines))
        models = {
            line.model: {"ready": ok and not line.breaker.is_open, "running": line.admission.running,
                         "waiting": line.admission.waiting, "breaker_open": line.breaker.is_open}
            for line, ok in zip(lines, found, strict=True)
        }  # fmt: skip
        store = await state.store.alive()
        up = sum(bool(model["ready"]) for model in models.values())
        some = store and up > 0
        status = ("ready" if up == len(models) else "degraded") if some else "not ready"
        told: dict[str, Any] = {"status": status}
        if key is not None:
            told |= {"store": store, "models": {n: model for n, model in models.items() if key.allows(n)}}
        await answer(send, 200 if some else 503, told)

    async def _feedback(self, scope: "Scope", receive: "Receive", send: "Send", key: ApiKey) -> None:
        if self.state.recorder is None:
            raise ApiError(404, "Feedback is not kept here: gateway.record.folder is not set.", "feedback_off")
        body = parse(await read_body(scope, receive, 64 << 10))
        request_id, score, comment = body.get("request_id"), body.get("score"), body.get("comment", "")
        if not isinstance(request_id, str) or not request_id or len(request_id) > 200:
            raise bad_request("request_id is the x-request-id of an answer.", "request_id")
        if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
            raise bad_request("score is a number from -1 (bad) to 1 (good).", "score")
        if not isinstance(comment, str):
            raise bad_request("comment is a text.", "comment")
        for prefix in ("chatcmpl-", "cmpl-"):
            request_id = request_id.removeprefix(prefix)
        self.state.recorder.feedback(request_id, float(score), comment, key.owner)
        await answer(send, 200, {"status": "kept", "request_id": request_id})

    async def _relayed(self, scope: "Scope", receive: "Receive", send: "Send", path: str, key: ApiKey) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        ids = new_ids(*(headers.get(name, b"").decode("latin-1") for name in (b"x-request-id", b"traceparent")))
        exchange = Exchange(*ids, path=path, key=key)
        exchange.answer = "" if self.state.texts else None
        try:
            exchange.passed_on = [(n, v) for n, v in headers.items() if passes(n)]
            exchange.content_type = headers.get(b"content-type", JSON[1])
            exchange.raw = await read_body(scope, receive, int(self._settings.max_body_mb * 2**20))
            await self._choose(exchange)
            exchange.extra_headers = await self._admit(key)
            exchange.admitted = True
            if path == RAG and self.state.rag is not None:
                work = partial(self.state.rag.answer, exchange)
            else:
                work = partial(relay, self.state.lines, exchange)
            await until_gone(receive, send, work)
        except ApiError as error:
            exchange.status, exchange.error, error.counted = error.status, error.kind, True
            exchange.reason = exchange.reason or error.message
            error.headers += marks(exchange)
            raise
        except (ClientGone, asyncio.CancelledError) as gone:
            exchange.error = "client_gone"
            if isinstance(gone, asyncio.CancelledError):
                raise
        except Exception:
            exchange.status, exchange.error = 500, "internal_error"
            raise
        finally:
            exchange.total_s = time.perf_counter() - exchange.begun
            self._account(exchange)

    async def _choose(self, exchange: Exchange) -> None:
        """Read the body's model, and put a route's variant in its place. Raises ApiError 400, 403 or 404."""
        if exchange.content_type.startswith(b"multipart/"):
            exchange.form = await read_form(exchange.raw, exchange.content_type)
            name = exchange.form.get("model")
        else:
            exchange.body = parse(exchange.raw)
            name = exchange.body.get("model")
        cards = await self.state.lines.cards()
        if name is None and len(cards) == 1:
            name = next(iter(cards))
        if not isinstance(name, str) or not name:
            raise bad_request(
                f"Give 'model', one of: {', '.join(n for n in cards if exchange.key.allows(n))}.", "model"
            )
        if not exchange.key.allows(name):
            raise model_forbidden(name[:200]) if name in cards else model_unknown(name[:200])
        if name not in cards:
            raise model_unknown(name[:200])
        exchange.asked = name
        if name in self._settings.routes:
            exchange.variant_of = name
            exchange.asked = variant(name, self._settings.routes[name], exchange.user or exchange.key.id)

    def _account(self, exchange: Exchange) -> None:
        """Count, log, keep and charge a request that has ended; the charge in its own time."""
        state = self.state
        state.metrics.note(exchange)
        access_log.write(state.logger, exchange, self._settings.log_text)
        if state.recorder and exchange.admitted and (exchange.served or exchange.error):
            state.recorder.request(exchange)
        if not (exchange.served or exchange.side_tokens or exchange.cost):
            return  # no engine worked for it
        used = Usage(1, exchange.prompt_tokens + exchange.side_tokens, exchange.completion_tokens, exchange.cost)
        task = asyncio.create_task(self._charge(exchange.key, used))
        state.later.add(task)
        task.add_done_callback(state.later.discard)

    async def _charge(self, key: ApiKey, used: Usage) -> None:
        try:
            await self.state.quota.charge(key, used)
        except Exception:
            log.exception("the use of key %s could not be noted: %s", key.id, used)


def _rag(settings: GatewayConfig, lines: Lines) -> "Rag | None":
    if not settings.rag.uri:
        return None
    from serve.gateway.rag import Rag  # it brings the search, which takes seconds to load

    return Rag(settings.rag, lines)


def _recorder(settings: GatewayConfig) -> "Recorder | None":
    if settings.record.folder is None:
        return None
    from serve.gateway.record import Recorder  # its rules of redaction take a second to load

    return Recorder(settings.record)


def passes(name: bytes) -> bool:
    """Whether a client's header is the engine's business: vLLM's and Serve's own, and the trace's."""
    ours = (b"x-request-id", b"x-forwarded", b"x-real-ip")
    return name == b"tracestate" or (name.startswith(b"x-") and not name.startswith(ours) and b"key" not in name)


async def _quietly(cards: Any) -> dict[str, Any]:
    try:
        return dict(await cards)
    except Exception:
        log.exception("the engines do not list their models")
        return {}
