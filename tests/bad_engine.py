"""An OpenAI-compatible server that misbehaves on purpose, as the last word of the prompt says.

    python tests/bad_engine.py PORT

    hello            streams or answers 5 tokens                stuck       never answers
    role             sends the role, then nothing
    cut              2 tokens, then the connection breaks       fail        500
    die              2 tokens, then the process is gone         once ID     500 the first time, then 5 tokens
    refuse           400, as for a prompt that is too long      silent      a stream that ends without [DONE]
    broken           fails until POST /mend                     long        2,000 tokens, one every 10 ms
    held             answers after POST /release                slow        0.2 s before each of 5 tokens
    flood            2,000 tokens of 8 KB, as fast as they are taken

``GET /seen`` tells what it has seen: requests, those that run, those whose client left, the last headers and body.
"""

import asyncio
import json
import os
import sys
from typing import Any

TOKENS = ["one ", "two ", "three ", "four ", "five"]
seen: dict[str, Any] = {"requests": 0, "running": 0, "aborted": 0, "headers": {}, "body": None}
once: set[str] = set()
mended = False
released = asyncio.Event()


def chunk(text: str | None, **more: Any) -> bytes:
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}], **more}).encode() + b"\n\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    global mended
    if scope["type"] != "http":
        return
    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/seen":
        await reply(send, 200, seen)
    elif scope["path"] == "/mend":
        mended = True
        await reply(send, 200, {})
    elif scope["path"] == "/release":
        released.set()
        released.clear()  # those that wait now go on
        await reply(send, 200, {})
    elif scope["path"] == "/v1/models":
        await reply(send, 200, {"object": "list", "data": [{"id": "engine"}]})
    else:
        seen["requests"] += 1
        seen["running"] += 1
        seen["headers"] = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        seen["body"] = json.loads(raw)
        work = asyncio.create_task(answer(seen["body"], scope["path"], send))
        left = asyncio.create_task(receive())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                seen["aborted"] += 1
        finally:
            seen["running"] -= 1
            work.cancel()
            left.cancel()


async def reply(send: Any, status: int, body: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def answer(body: dict[str, Any], path: str, send: Any) -> None:
    if path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [1.0, 0.0]}]
        await reply(send, 200, {"object": "list", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
        return
    prompt = body.get("prompt") or (body.get("messages") or [{}])[-1].get("content") or "hello"
    words = str(prompt).split() or ["hello"]
    way = words[0] if words[0] == "once" else words[-1]
    if way == "stuck":
        await asyncio.sleep(3600)
    if way == "held":
        await released.wait()
    if way == "fail" or (way == "broken" and not mended) or (way == "once" and words[-1] not in once):
        once.add(words[-1])
        await reply(send, 500, {"error": {"message": "CUDA error: secret detail", "code": 500}})
        return
    if way == "refuse":
        error = {"message": "This model's maximum context length is 8 tokens.", "type": "BadRequestError", "code": 400}
        await reply(send, 400, {"error": error})
        return
    tokens = {"long": ["x "] * 2000, "flood": ["x " * 4096] * 2000}.get(way, TOKENS)
    usage = {"prompt_tokens": 7, "completion_tokens": len(tokens), "total_tokens": 7 + len(tokens)}
    if not body.get("stream"):
        if way in ("cut", "die"):
            headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})
            await breaks(way, send)
        await asyncio.sleep(1.0 if way == "slow" else 0)
        message = {"index": 0, "message": {"role": "assistant", "content": "".join(tokens)}, "finish_reason": "stop"}
        await reply(send, 200, {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
                                "choices": [message], "usage": usage})  # fmt: skip
        return
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    more = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    await event(chunk(None, **more))
    if way == "role":
        await asyncio.sleep(3600)
    for number, token in enumerate(tokens):
        if number == 2 and way in ("cut", "die"):
            await breaks(way, send)
        await asyncio.sleep({"slow": 0.2, "long": 0.01}.get(way, 0))
        await event(chunk(token, **more))
    if way != "silent":
        if (body.get("stream_options") or {}).get("include_usage"):
            await event(b"data: " + json.dumps({**more, "choices": [], "usage": usage}).encode() + b"\n\n")
        await event(b"data: [DONE]\n\n")
    await send({"type": "http.response.body", "body": b""})


async def breaks(way: str, send: Any) -> None:
    await asyncio.sleep(0.05)  # what was sent has left
    if way == "die":
        os._exit(1)
    raise ConnectionError("cut on purpose")  # the server closes the connection without an end of the body


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", lifespan="off")
