"""CPU time that the gateway adds to a request and to a token, without network and without an engine.

    python -m benchmarks.gateway_overhead

The application under the gateway answers at once. The same requests go to it directly and through the gateway, in
turn, in one process; what is measured is the process' own CPU time, which other programs on the machine do not change.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

from serve.gateway.api_keys import key_of, open_store
from serve.gateway.app import Gateway
from serve.gateway.settings import GatewayConfig

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello " * 100}], "stream": True}
HEAD = [(b"content-type", b"text/event-stream; charset=utf-8")]
CHUNK = {
    "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
    "choices": [{"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}],
}  # fmt: skip
EVENT = b"data: " + orjson.dumps(CHUNK) + b"\n\n"


def application(tokens: int) -> Any:
    """An OpenAI server that streams so many tokens at once."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            body = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        orjson.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


async def once(app: Any, headers: list[tuple[bytes, bytes]]) -> int:
    """One request; the bytes of its answer."""
    size = 0
    given = False
    ended = asyncio.Event()

    async def receive() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": orjson.dumps(BODY), "more_body": False}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal size
        size += len(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "", "headers": headers}
    await app(scope, receive, send)
    ended.set()
    return size


async def measure(requests: int, rounds: int, tokens: int, folder: Path) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU a request, direct and through the gateway, a value a round."""
    settings = GatewayConfig(store=f"sqlite:///{folder / 'gateway.db'}", log_file=folder / "access.jsonl")
    key = key_of("wb-key", "owner", requests_per_minute=10**9, tokens_per_minute=10**9)
    await open_store(settings.store).add(key)
    direct = application(tokens)
    through = Gateway(application(tokens), settings)
    headers = [(b"authorization", b"Bearer wb-key"), (b"content-type", b"application/json")]
    times: dict[Any, list[float]] = {direct: [], through: []}
    for number in range(rounds + 1):
        for app, found in times.items():
            begun = time.process_time()
            for _ in range(requests):
                assert await once(app, headers) > tokens * len(EVENT)
            if number:  # the first round warms up
                found.append(1000 * (time.process_time() - begun) / requests)
    await through.close()
    return times[direct], times[through]


def main() -> None:
    """Print the added CPU time of a request and of a token."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    added = {}
    for tokens in (1, 101):
        with tempfile.TemporaryDirectory() as folder:
            work = measure(arguments.requests, arguments.rounds, tokens, Path(folder))
            direct, through = asyncio.run(work)
        gaps = [b - a for a, b in zip(direct, through, strict=True)]
        added[tokens] = statistics.median(gaps)
        print(
            f"{tokens} tokens: direct {statistics.median(direct):.3f} ms, through {statistics.median(through):.3f} ms, "
            f"added {added[tokens]:.3f} ms of CPU a request ({min(gaps):.3f} to {max(gaps):.3f})"
        )
    print(f"added a token: {10 * (added[101] - added[1]):.1f} us")


if __name__ == "__main__":
    main()
