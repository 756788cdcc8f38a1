"""Send requests and time their answers: vLLM's own load generator, whose arrivals and clients are driven from here.

vLLM 0.32's ``benchmarks/serve.py`` gives the arrival process (constant, Poisson, ramped, replayed) and the client that
times a streamed chat: time to first token from sending to the first chunk, gaps between the chunks after it, token
counts by the server's ``usage``. What is here: levels that end by the clock, a time-out, errors by kind, and a watch
over the generator itself, for a generator at its limit measures itself.
"""

import asyncio
import importlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import aiohttp

Arrival = Literal["closed", "constant", "poisson", "ramp", "replay"]
PHRASES = {status.phrase: status.value for status in HTTPStatus}
"""vLLM's client keeps the reason phrase of a refused request, not its status."""
BACK_OFF_SECONDS = 0.1
"""A client in a closed loop waits so long after an error: a server that refuses at once must not be hammered."""
LAG_INTERVAL = 0.01


@dataclass(frozen=True)
class Prompt:
    """What one request asks: a chat, how long its answer is, and, in replayed traffic, when it came."""

    messages: tuple[dict[str, Any], ...]
    max_tokens: int
    at: float = 0.0

    @classmethod
    def of(cls, text: str, max_tokens: int) -> "Prompt":
        """A chat of one message."""
        return cls(({"role": "user", "content": text},), max_tokens)


@dataclass(frozen=True)
class Outcome:
    """One request. Times in seconds; ``error`` is empty or its kind, and then the times mean nothing. ``late`` is how
    much later than its arrival it was sent: in a replay by the recorded time, else by when vLLM's process let it go."""

    started: float
    latency: float
    first_token: float
    output_tokens: int
    prompt_tokens: int
    error: str = ""
    gaps: tuple[float, ...] = ()
    late: float = 0.0

    @property
    def inter_token(self) -> float | None:
        """Mean seconds a token after the first, or None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Target:
    """Who is asked, and how."""

    base_url: str
    key: str
    model: str
    ignore_eos: bool
    timeout: float


@dataclass(frozen=True)
class Level:
    """How hard: in a closed loop ``load`` requests in flight, else ``load`` requests a second (at the end of a ramp,
    which begins at ``start``), for ``seconds``. A replay is sent at its own times."""

    arrival: Arrival
    load: float
    seconds: float
    start: float = 0.0

    def __str__(self) -> str:
        if self.arrival == "closed":
            return f"x{self.load:g}"
        return {"ramp": f"{self.start:g} to {self.load:g}/s", "replay": "replay"}.get(self.arrival, f"{self.load:g}/s")


@dataclass(frozen=True)
class Watch:
    """What the generator did beside measuring: the share of one core that its process used, how late its event loop
    was (p99, seconds), and the wall clock's drift against the monotonic one over the level (seconds)."""

    cpu: float
    lag: float
    drift: float

    def saturated(self) -> str:
        """Why the figures may be the generator's own, or empty."""
        if self.cpu > 0.9:
            return f"the generator used {self.cpu:.0%} of a core"
        return f"the generator's loop was {self.lag * 1000:.0f} ms late at p99" if self.lag > 0.05 else ""


@dataclass(frozen=True)
class Driven:
    """A level's outcomes, the wall time from the first request to the last answer, and the watch over it."""

    outcomes: list[Outcome]
    wall: float
    watch: Watch

    @property
    def late(self) -> float:
        """Seconds that requests were sent after their arrivals, p99; 0 in a closed loop."""
        return p99([outcome.late for outcome in self.outcomes])


@dataclass
class _Lags:
    values: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        """Sleep again and again, and keep how much longer each sleep took."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(LAG_INTERVAL)
            self.values.append(time.perf_counter() - begun - LAG_INTERVAL)


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 do not pass; 0 without any."""
    ordered = sorted(values)
    return ordered[int(len(ordered) * 0.99)] if ordered else 0.0


def drive(target: Target, prompts: Sequence[Prompt], level: Level) -> Driven:
    """Send ``prompts``, over and over, at ``level``; requests in flight at its end may finish."""
    # vLLM's import takes seconds, which are not the level's
    importlib.import_module("vllm.benchmarks.lib.endpoint_request_func")
    if level.arrival != "closed":
        importlib.import_module("vllm.benchmarks.serve")
    return asyncio.run(_drive(target, prompts, level))


async def _drive(target: Target, prompts: Sequence[Prompt], level: Level) -> Driven:
    import aiohttp

    lags = _Lags()
    limits = aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
        watching = asyncio.create_task(lags.watch())
        begun, wall, cpu = time.perf_counter(), time.time(), time.process_time()
        if level.arrival == "closed":
            outcomes = await _closed(session, target, prompts, level, begun)
        else:
            outcomes = await _open(session, target, prompts, level)
        took = time.perf_counter() - begun
        drift = time.time() - wall - took
        watching.cancel()
    watch = Watch((time.process_time() - cpu) / took, p99(lags.values), drift)
    return Driven(outcomes, took, watch)


async def _closed(
    session: "aiohttp.ClientSession", target: Target, prompts: Sequence[Prompt], level: Level, begun: float
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    queue: Iterator[Prompt] = itertools.cycle(prompts)

    async def client() -> None:
        while time.perf_counter() < begun + level.seconds:
            outcome = await request(session, target, next(queue), time.perf_counter())
            outcomes.append(outcome)
            if outcome.error:
                await asyncio.sleep(BACK_OFF_SECONDS)

    await asyncio.gather(*(client() for _ in range(int(level.load))))
    return outcomes


async def _open(
    session: "aiohttp.ClientSession", target: Target, prompts: Sequence[Prompt], level: Level
) -> list[Outcome]:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import get_request

    count = planned_requests(level, len(prompts))
    asked = list(itertools.islice(itertools.cycle(prompts), count))
    samples = [SampleRequest(prompt=one, prompt_len=0, expected_output_len=one.max_tokens, timestamp=one.at)
               for one in asked]  # fmt: skip
    ramp: dict[str, Any] = {}
    if level.arrival == "ramp":
        ramp = {"ramp_up_strategy": "linear", "ramp_up_start_rps": level.start, "ramp_up_end_rps": level.load}
    tasks = []
    begun = time.perf_counter()
    arrivals = get_request(
        samples, level.load, burstiness=1.0 if level.arrival == "poisson" else math.inf,
        self_timed=level.arrival == "replay", **ramp,
    )  # fmt: skip
    async for sample, _ in arrivals:
        prompt: Any = sample.prompt
        arrived = begun + prompt.at if level.arrival == "replay" else time.perf_counter()
        tasks.append(asyncio.create_task(request(session, target, prompt, arrived)))
    return list(await asyncio.gather(*tasks))


def planned_requests(level: Level, prompts: int) -> int:
    """How many requests an open-loop level sends: all of a replay, else rate times seconds (of a ramp the mean
    rate)."""
    if level.arrival == "replay":
        return prompts
    rate = (level.start + level.load) / 2 if level.arrival == "ramp" else level.load
    return max(1, round(rate * level.seconds))


async def request(session: "aiohttp.ClientSession", target: Target, prompt: Prompt, arrived: float) -> Outcome:
    """Send one request with vLLM's client."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_chat_completions

    asked = RequestFuncInput(
        prompt="",
        chat_messages=list(prompt.messages),
        api_url=f"{target.base_url}/chat/completions",
        prompt_len=0,
        output_len=prompt.max_tokens,
        model=target.model,
        ignore_eos=target.ignore_eos,
        extra_headers={"Authorization": f"Bearer {target.key}"},
        extra_body={"temperature": 0},
    )
    told = await async_request_openai_chat_completions(asked, session)
    error = "" if told.success else error_kind(told.error)
    if not error and not told.output_tokens:
        error = "no usage in the stream"  # it was cut short, or an error came in it
    return Outcome(
        started=told.start_time, latency=told.latency, first_token=told.ttft, output_tokens=told.output_tokens or 0,
        prompt_tokens=told.prompt_len, error=error, gaps=tuple(told.itl), late=max(0.0, told.start_time - arrived),
    )  # fmt: skip


def error_kind(text: str) -> str:
    """A short kind of what vLLM's client tells: a status, the class of an exception, or the beginning of a sentence."""
    if text in PHRASES:
        return f"HTTP {PHRASES[text]}"
    if "Traceback (most recent call last)" in text:
        last = text.strip().splitlines()[-1]
        return last.partition(":")[0].rpartition(".")[2]
    return text.partition(".")[0][:60] or "HTTP error without a reason"
