"""What Prometheus reads at ``/metrics``: the time and the tokens of requests, by model and owner of the key.

vLLM's own metrics (``ray_vllm_*``) come from Ray's agents on each node; the scrape file that ``serve observe`` writes
has both. With several gateway replicas ``prometheus_client`` adds them up through files of a folder that they share on
a host (its multiprocess mode). A scrape reaches one of them, so gauges are set when they change.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from serve.gateway.exchange import Exchange
from workbench.config import environment

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
WHO = ("model", "owner")
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        if shared := environment(SHARED_FOLDER):
            Path(shared).mkdir(
                parents=True, exist_ok=True
            )  # it was made on another host, where replicas are on several

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"workbench_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"workbench_{name}_seconds", text, WHO, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, over_replicas: Literal["livesum", "livemax"]) -> Gauge:
            return Gauge(f"workbench_{name}", text, ("model",), registry=registry, multiprocess_mode=over_replicas)

        self._requests = counter("requests", "Requests by what became of them", *WHO, "outcome")
        self._tokens = counter("tokens", "Tokens", *WHO, "kind")
        self._cost = counter("cost", "What requests cost, in the prices' currency", *WHO)
        self._energy = counter("energy_wh", "Energy of requests, in watt hours", *WHO)
        self._retries = counter("retries", "Further attempts at the same model", "model")
        self._fallbacks = counter("fallbacks", "Answers of another model than the one asked for", "model", "served")
        self._first = histogram("time_to_first_token", "From arrival to the first token of a stream", FIRST)
        self._token = histogram("inter_token", "Time a token after the first, mean of a stream", TOKEN)
        self._whole = histogram("request", "From arrival to the end of the answer", WHOLE)
        self._queue = histogram("queue", "Waiting for a place at the engine", FIRST)
        self._running = gauge("running", "Requests at the engine", "livesum")
        self._waiting = gauge("waiting", "Requests that wait for the engine", "livesum")
        self._open = gauge("breaker_open", "Whether the circuit breaker of any replica is open", "livemax")

    def note(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        who = (exchange.served or "none", exchange.key.owner)
        self._requests.labels(*who, exchange.error or "ok").inc()
        self._whole.labels(*who).observe(exchange.total_s)
        self._queue.labels(*who).observe(exchange.queued_s)
        if exchange.first_token_s is not None:
            self._first.labels(*who).observe(exchange.first_token_s)
        if exchange.inter_token_s is not None:
            self._token.labels(*who).observe(exchange.inter_token_s)
        self._tokens.labels(*who, "prompt").inc(exchange.prompt_tokens)
        self._tokens.labels(*who, "completion").inc(exchange.completion_tokens)
        self._tokens.labels(*who, "side").inc(exchange.side_tokens)
        if exchange.cost:
            self._cost.labels(*who).inc(exchange.cost)
        if exchange.energy_wh:
            self._energy.labels(*who).inc(exchange.energy_wh)
        if exchange.fallback_from and exchange.started:
            self._fallbacks.labels(exchange.fallback_from, who[0]).inc()
        if exchange.attempts > 1 and not exchange.fallback_from:
            self._retries.labels(who[0]).inc(exchange.attempts - 1)

    def refused(self, owner: str, kind: str) -> None:
        """Count a request that reached no model."""
        self._requests.labels("none", owner, kind).inc()

    def places(self, model: str) -> Callable[[int, int], None]:
        """What is to be told how many requests run at the engine of ``model`` and wait for it, when that changes."""
        running, waiting = self._running.labels(model), self._waiting.labels(model)

        def told(now_running: int, now_waiting: int) -> None:
            running.set(now_running)
            waiting.set(now_waiting)

        return told

    def breaker(self, model: str) -> Callable[[bool], None]:
        """What is to be told whether the breaker of the engine of ``model`` is open, when that may have changed."""
        return self._open.labels(model).set

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        registry: Any = self._registry
        if shared := environment(SHARED_FOLDER):
            forget_ended(Path(shared))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return bytes(generate_latest(registry))


def forget_ended(folder: Path) -> None:
    """Drop the gauges of processes of this host that have ended, as a replica that is killed cannot itself."""
    for pid in {int(file.stem.rsplit("_", 1)[1]) for file in folder.glob("gauge_live*_*.db")}:
        if not psutil.pid_exists(pid):
            with contextlib.suppress(FileNotFoundError):  # another replica is asked at the same time
                mark_process_dead(pid, folder)
