"""A closed-loop load generator for streaming chat completions: N clients, each sends its next request after its last.

Times follow vLLM's benchmark: time to first token is from sending to the first chunk with text; inter-token latency
is a request's remaining time divided by its remaining tokens (servers may send several tokens in one chunk); token
counts are the server's own ``usage``. Why not that benchmark itself: it needs vLLM where it runs (macOS has none) and
nine CPU-seconds of imports a level, and names a refused request by its reason phrase alone.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Outcome:
    """One request. Times in seconds; ``error`` is empty or its kind, and then the times mean nothing."""

    started: float
    latency: float
    first_token: float
    output_tokens: int
    prompt_tokens: int
    error: str = ""

    @property
    def inter_token(self) -> float | None:
        """Seconds a token after the first, or None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Target:
    """What is asked of which model."""

    base_url: str
    key: str
    model: str
    max_tokens: int
    ignore_eos: bool
    timeout: float


def drive(target: Target, prompts: Sequence[str], concurrency: int, seconds: float) -> tuple[list[Outcome], float]:
    """Keep ``concurrency`` requests in flight for ``seconds``, then let those in flight end.

    Returns the outcomes and the wall time from the first request to the last answer.
    """
    return asyncio.run(_drive(target, prompts, concurrency, seconds))


async def _drive(
    target: Target, prompts: Sequence[str], concurrency: int, seconds: float
) -> tuple[list[Outcome], float]:
    outcomes: list[Outcome] = []
    queue = itertools.cycle(prompts)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    headers = {"Authorization": f"Bearer {target.key}"}
    async with httpx.AsyncClient(limits=limits, headers=headers, timeout=target.timeout) as client:
        begun = time.perf_counter()
        clients = (_one_client(client, target, queue, begun + seconds, outcomes) for _ in range(concurrency))
        await asyncio.gather(*clients)
        return outcomes, time.perf_counter() - begun


async def _one_client(
    client: httpx.AsyncClient, target: Target, prompts: Iterator[str], deadline: float, outcomes: list[Outcome]
) -> None:
    while time.perf_counter() < deadline:
        outcome = await _request(client, target, next(prompts))
        outcomes.append(outcome)
        if outcome.error:
            await asyncio.sleep(0.1)  # a server that refuses at once must not be hammered


async def _request(client: httpx.AsyncClient, target: Target, prompt: str) -> Outcome:
    body: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    begun = time.perf_counter()
    first = last = 0.0
    usage: dict[str, int] = {}
    error = ""
    try:
        async with client.stream("POST", f"{target.base_url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                error = f"HTTP {response.status_code}"
            else:
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        error = f"stream: {chunk['error'].get('type', 'error')}"
                        break
                    usage = chunk.get("usage") or usage
                    if any(choice["delta"].get("content") for choice in chunk["choices"]):
                        last = time.perf_counter()
                        first = first or last
    except httpx.HTTPError as raised:
        error = type(raised).__name__
    if not error and not usage:
        error = "no usage in the stream"
    ended = last or time.perf_counter()
    return Outcome(
        started=begun,
        latency=ended - begun,
        first_token=(first or ended) - begun,
        output_tokens=usage.get("completion_tokens", 0),
        prompt_tokens=usage.get("prompt_tokens", 0),
        error=error,
    )
