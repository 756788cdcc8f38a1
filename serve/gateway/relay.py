"""Bring a request to an engine and its answer to the client, through queue, breaker, retries and fallback.

Until the first token has gone to the client everything can be tried again: at the same engine (``tenacity``), then at
the models of the fallback chain. After it an error can only be told inside the stream.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from serve.gateway.asgi import ClientGone
from serve.gateway.engines import HOP, Call, EngineLost, Headers, InsideEngine, Reply
from serve.gateway.errors import ApiError, cut, timed_out, unavailable
from serve.gateway.exchange import Exchange
from serve.gateway.lines import Line, Lines
from serve.gateway.sse import Events, error_event, text_of

Send = Callable[[Any], Awaitable[None]]
NOT_THE_CLIENTS = {401, 403, 407, 408, 429}
"""Statuses by which an engine speaks of the gateway's own key or of its load, not of what the client asked."""
MOST_OF_AN_ERROR = 4096
LAST_WORDS_SECONDS = 5.0
"""A client that does not take the end of its answer within this is let go, and with it its place at the engine."""
SHORT_TEXT = 8
"""A shorter text of a request, such as a role or a number, may stand in an error by chance."""
log = logging.getLogger("workbench.gateway")


async def relay(lines: Lines, exchange: Exchange, send: Send) -> None:
    """Answer ``exchange``, by the first model of its chain that can. Raises ApiError where none could begin to."""
    first = await lines.line(exchange.asked)
    chain = [first.model, *(model for model in first.policy.fallback if exchange.key.allows(model))]
    problem: ApiError | None = None
    for model in chain:
        try:
            exchange.fallback_from = exchange.asked if model != exchange.asked else ""
            await _at_model(await lines.line(model), exchange, send)
            return
        except ApiError as error:
            if exchange.started or (error.status < 500 and problem is None):
                raise
            exchange.reason = exchange.reason or error.message
            problem = problem or error
    assert problem is not None
    raise problem


async def _at_model(line: Line, exchange: Exchange, send: Send) -> None:
    attempts = AsyncRetrying(
        stop=stop_after_attempt(1 + line.policy.retries),
        wait=wait_random_exponential(0.05, max=1.0),
        retry=retry_if_exception(lambda e: isinstance(e, ApiError) and e.again and not exchange.started),
        reraise=True,
    )
    async with line.admission.place() as waited:
        exchange.queued_s += waited
        async for attempt in attempts:
            with attempt:
                trying = line.breaker.enter()
                exchange.attempts += 1
                exchange.served = line.model
                try:
                    await _attempt(line, exchange, send)
                finally:
                    line.breaker.leave(trying)


async def _attempt(line: Line, exchange: Exchange, send: Send) -> None:
    """One try. The breaker learns what became of it, and the exchange what it used."""
    policy = line.policy
    bearing = line.meter.start()
    try:
        async with asyncio.timeout(policy.timeout) as whole, asyncio.timeout(None) as silence:
            if exchange.streaming:
                _listen(silence, line)
            async with line.engine.send(_call(line, exchange)) as reply:
                await _pass_on(line, exchange, reply, silence, send)
        if exchange.error == "engine_failed":
            line.breaker.failed()
        else:
            line.breaker.answered()
    except (EngineLost, TimeoutError) as fault:
        if not (exchange.started and whole.expired()):  # an answer that came all the while: its client was slow
            line.breaker.failed()
        log.warning("%s: %s: %s", exchange.request_id, line.model, fault or type(fault).__name__)
        if isinstance(fault, EngineLost):
            error = cut(line.model) if exchange.started else unavailable(line.model)
        elif whole.expired():
            error = timed_out(line.model, "answer", policy.timeout)
        else:
            error = timed_out(line.model, "token", policy.first_token_timeout)
        await _end_badly(exchange, error, send)
    except ApiError as error:
        if error.status >= 500:
            line.breaker.failed()
        await _end_badly(exchange, error, send)
    finally:
        seconds = line.meter.stop(bearing)
        exchange.used_s += seconds
        exchange.cost += seconds * policy.price_per_second
        exchange.energy_wh += seconds * policy.watts / 3600


async def _end_badly(exchange: Exchange, error: ApiError, send: Send) -> None:
    """Raise ``error``, or tell it inside the stream that has begun; ClientGone where the client takes no more."""
    if not exchange.started:
        raise error
    exchange.error, exchange.reason = error.kind, error.message
    try:
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await send({"type": "http.response.body", "body": error_event(error.fields()), "more_body": False})
    except TimeoutError:
        raise ClientGone from None


def _call(line: Line, exchange: Exchange) -> Call:
    own = isinstance(line.engine, InsideEngine)
    headers: Headers = [
        *exchange.passed_on,
        (b"content-type", exchange.content_type if exchange.body is None else b"application/json"),
        (b"x-request-id", exchange.request_id.encode()),
        (b"traceparent", exchange.traceparent.encode()),
    ]
    return Call("POST", exchange.path, exchange.body_for(line.name_there, own=own), headers)


def _listen(silence: asyncio.Timeout, line: Line) -> None:
    """The engine's turn: it has so long for its next token."""
    silence.reschedule(asyncio.get_running_loop().time() + line.policy.first_token_timeout)


async def _pass_on(line: Line, exchange: Exchange, reply: Reply, silence: asyncio.Timeout, send: Send) -> None:
    if reply.status >= 500 or reply.status in NOT_THE_CLIENTS:
        body = b"".join([part async for part in reply.body])
        why = without_texts(body.decode(errors="replace"), exchange.texts)[:500]
        log.warning("%s: %s answered %d: %s", exchange.request_id, line.model, reply.status, why)
        raise unavailable(line.model)
    kind = next((value for name, value in reply.headers if name.lower() == b"content-type"), b"")
    if kind.startswith(b"text/event-stream"):
        await _stream(line, exchange, reply, silence, send)
    else:
        await _whole(exchange, reply, send)


def without_texts(words: str, asked: Any) -> str:
    """What an engine says of a failure, less the texts of the request, which no log shall hold.

    Of more than ``MOST_OF_AN_ERROR`` characters only their number is told: they are an echo of what was asked.
    """
    if len(words) > MOST_OF_AN_ERROR:
        return f"[{len(words)} characters]"
    for text in sorted(_texts(asked), key=len, reverse=True):  # one may be a part of another
        plain = {text, repr(text)[1:-1]}
        for written in plain | {json.dumps(each, ensure_ascii=pure)[1:-1] for each in plain for pure in (True, False)}:
            words = words.replace(written, "[text]")
    return words


def _texts(asked: Any) -> Iterator[str]:
    if isinstance(asked, str):
        if len(asked) >= SHORT_TEXT:
            yield asked
        return
    for value in asked.values() if isinstance(asked, dict) else asked if isinstance(asked, list) else ():
        yield from _texts(value)


def _reason(exchange: Exchange, error: dict[str, Any]) -> str:
    """An engine's own words of its error, as logs may hold them."""
    return without_texts(str(error.get("message")), exchange.texts)[:200]


async def _whole(exchange: Exchange, reply: Reply, send: Send) -> None:
    """An answer in one piece: it is sent when all of it is there, so that a cut can still be tried again."""
    body = b"".join([part async for part in reply.body])
    exchange.first_token_s = exchange.last_token_s = None
    try:
        told = orjson.loads(body)
        usage = told.get("usage") or {}
    except (orjson.JSONDecodeError, AttributeError):
        told, usage = {}, {}
    exchange.use_usage(usage if isinstance(usage, dict) else {})
    if exchange.answer is not None and isinstance(told, dict) and told.get("choices"):
        exchange.answer = text_of(told["choices"][0])
    if reply.status >= 400:
        error = told.get("error") if isinstance(told, dict) else None
        exchange.error = "engine_refused"
        exchange.reason = _reason(exchange, error) if isinstance(error, dict) else ""
    await _start(exchange, reply, send, [(b"content-length", str(len(body)).encode())])
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _stream(line: Line, exchange: Exchange, reply: Reply, silence: asyncio.Timeout, send: Send) -> None:
    """A stream: nothing is sent before its first token, everything at once after it."""
    events = Events(hide_usage=not exchange.asked_for_usage)
    if exchange.answer is not None:
        events.text = []
    held = b""
    try:
        async for part in reply.body:
            out, new = events.feed(part)
            if events.error is not None and not exchange.started:
                raise _told_error(line, exchange, events.error)
            if new:
                exchange.last_token_s = time.perf_counter() - exchange.begun
            held += out
            if not held or not (exchange.started or new or events.done):
                continue
            silence.reschedule(None)  # now it is the client's turn
            if not exchange.started:
                exchange.first_token_s = exchange.last_token_s
                await _start(exchange, reply, send, [(b"cache-control", b"no-cache")])
            await send({"type": "http.response.body", "body": held, "more_body": True})
            held = b""
            _listen(silence, line)
        if not events.done:
            raise EngineLost("the stream ended without its last event")
        if events.error is not None:
            exchange.error, exchange.reason = "engine_failed", _reason(exchange, events.error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        exchange.use_usage(events.usage, events.chunks)
        if events.text is not None:
            exchange.answer = "".join(events.text)


def _told_error(line: Line, exchange: Exchange, error: dict[str, Any]) -> ApiError:
    code, why = error.get("code"), _reason(exchange, error)
    if isinstance(code, int) and 400 <= code < 500:
        exchange.reason = why
        return ApiError(code, str(error.get("message")), "engine_refused", str(error.get("type")), error.get("param"))
    log.warning("%s: %s: %s", exchange.request_id, line.model, why)
    return unavailable(line.model)


async def _start(exchange: Exchange, reply: Reply, send: Send, more: Headers) -> None:
    exchange.started = True
    exchange.status = reply.status
    kept = [(n, v) for n, v in reply.headers if n.lower() not in HOP | {b"x-request-id"}]
    await send({"type": "http.response.start", "status": reply.status, "headers": [*kept, *more, *marks(exchange)]})


def marks(exchange: Exchange) -> Headers:
    """The headers by which a client sees which request this was and which model answered."""
    found = [(b"x-request-id", exchange.request_id.encode()), *exchange.extra_headers]
    if exchange.served:
        found.append((b"x-served-model", exchange.served.encode()))
    if exchange.fallback_from:
        found.append((b"x-fallback-from", exchange.fallback_from.encode()))
    if exchange.variant_of:
        found.append((b"x-variant-of", exchange.variant_of.encode()))
    return found
