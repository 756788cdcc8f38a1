"""ASGI in small: read a request's body, send an answer whole, and end work whose client has gone."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import orjson

from serve.gateway.errors import JSON, ApiError, bad_request

if TYPE_CHECKING:
    from starlette.datastructures import FormData
    from starlette.types import Receive, Scope, Send

PAGE = Path(__file__).with_name("chat.html")


class ClientGone(Exception):
    """The client closed its connection."""


async def answer(send: "Send", status: int, body: Any, content_type: tuple[bytes, bytes] = JSON) -> None:
    """Send a whole answer; anything but bytes as JSON."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    headers = [content_type, (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def send_page(send: "Send") -> None:
    """Send the chat page: it holds nothing but itself, and asks with the key that its user types."""
    data = PAGE.read_bytes()
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-length", str(len(data)).encode()),
        (b"content-security-policy", b"default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"),
        (b"referrer-policy", b"no-referrer"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def send_error(send: "Send", error: ApiError) -> None:
    """Send an error in OpenAI's shape."""
    body = error.body()
    headers = [*error.all_headers(), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def read_body(scope: "Scope", receive: "Receive", most: int) -> bytes:
    """The whole body. Raises ApiError 413 past ``most`` bytes, ClientGone where it ends early."""
    too_large = ApiError(413, f"The body is larger than {most} bytes.", "body_too_large")
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit() and int(value) > most:
            raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_form(raw: bytes, content_type: bytes) -> "FormData":
    """The fields of a multipart form. Raises ApiError 400 for what is none."""
    from starlette.datastructures import Headers
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> Any:
        yield raw

    try:
        return await MultiPartParser(Headers(raw=[(b"content-type", content_type)]), stream()).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise bad_request(f"The body is no multipart form: {error}.") from None


def write_form(form: "FormData", content_type: bytes, model: str) -> bytes:
    """The form with ``model`` for its field of that name, between the boundaries that ``content_type`` tells."""
    parts: list[tuple[str, Any]] = [("model", (None, model))]
    for name, value in form.multi_items():
        if name != "model":
            parts.append((name, (None, value) if isinstance(value, str) else
                          (value.filename, value.file, value.content_type)))  # fmt: skip
    headers = {"content-type": content_type.decode("latin-1")}
    return httpx.Request("POST", "http://form", files=parts, headers=headers).read()


async def until_gone(receive: "Receive", send: "Send", work: "Callable[[Send], Awaitable[None]]") -> None:
    """Do ``work`` unless the client leaves before it has the whole answer: ClientGone then, with the work cancelled."""
    ended = False

    async def noted(message: Any) -> None:
        nonlocal ended
        await send(message)
        ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work(noted)), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not ended:
            raise ClientGone
        await task
    finally:
        for each in (task, watch):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await each
