"""Samples as metrics of Ray's: each host's agent shows them on its metrics port, so one scrape config has them all.

Prometheus sees ``ray_workbench_gpu_busy{host="system-a", device="0"}`` and so on, one gauge for
each metric of ``samplers.UNITS``; counters are shown as they are, and ``rate()`` works on them.
"""

from collections.abc import Iterable
from typing import Any

from profiling.samplers import UNITS, Reading

PREFIX = "workbench_"
PER_PROCESS = ("process.cpu", "process.memory", "gpu.process_memory")
"""Not shown by process: Prometheus keeps a series for each that ever was. Ray's own metrics have the first two."""
HELD = "gpu_held_bytes"
TAGS = ("host", "device")


def metric_name(metric: str) -> str:
    """The name under which Ray shows a metric: Ray puts its own prefix before ours."""
    return f"ray_{PREFIX}{metric.replace('.', '_')}"


class MetricsExporter:
    """Sets Ray's gauges from readings; lives in a Ray worker."""

    def __init__(self, host: str) -> None:
        from ray.util.metrics import Gauge

        self._host = host
        self._gauges: dict[str, Any] = {}
        self._gauge = Gauge

    def show(self, readings: Iterable[Reading]) -> None:
        """Show the newest value of each reading, and of each card the memory that processes hold on it."""
        held: dict[str, float] = {}
        for reading in readings:
            if reading.metric == "gpu.process_memory":
                card = reading.device.partition("/")[0]
                held[card] = held.get(card, 0.0) + reading.value
            elif reading.metric == "gpu.busy":
                held.setdefault(reading.device, 0.0)
            if reading.metric not in PER_PROCESS:
                self._set(reading.metric.replace(".", "_"), UNITS[reading.metric], reading.device, reading.value)
        for card, size in held.items():
            self._set(HELD, "bytes that processes hold on the card", card, size)

    def show_facts(self, facts: dict[str, Any]) -> None:
        """Show what the host and its cards could have: memory, link, power."""
        self._set("host_memory_bytes", "what the host has", "", facts["memory_bytes"])
        for card, described in enumerate(facts.get("gpus", [])):
            for name in ("memory_bytes", "pcie_width_max", "pcie_generation_max", "power_limit"):
                if described.get(name) is not None:
                    self._set(f"gpu_{name}", "what the card has", str(card), described[name])

    def _set(self, name: str, unit: str, device: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._gauge(PREFIX + name, unit, TAGS)
        self._gauges[name].set(float(value), {"host": self._host, "device": device})
