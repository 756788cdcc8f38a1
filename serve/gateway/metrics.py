"""What Prometheus reads at ``/metrics``: the time and the tokens of requests, by model and owner of the key.

vLLM's own metrics (``ray_vllm_*``) come from Ray's agents on each node; the scrape file that ``serve observe`` writes
has both. With several gateway replicas ``prometheus_client`` adds them up through files of a folder that they share
(its multiprocess mode).
"""

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from serve.gateway.exchange import Exchange
from serve.gateway.lines import Line
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

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"workbench_{name}", text, ("model",), registry=registry, multiprocess_mode="livesum")

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
        self._running = gauge("running", "Requests at the engine")
        self._waiting = gauge("waiting", "Requests that wait for the engine")
        self._open = gauge("breaker_open", "Whether the circuit breaker is open")

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

    def render(self, lines: list[Line]) -> bytes:
        """The text that Prometheus reads."""
        for line in lines:
            self._running.labels(line.model).set(line.admission.running)
            self._waiting.labels(line.model).set(line.admission.waiting)
            self._open.labels(line.model).set(line.breaker.is_open)
        registry: Any = self._registry
        if environment(SHARED_FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return bytes(generate_latest(registry))
