"""Samplers: what one host's sensors say at one moment.

    host = HostSampler()
    host.read()          # [Reading("cpu.busy", "", 37.5), ...]
    host.read_slowly()   # [Reading("disk.read_bytes", "nvme0n1", 8.1e9), ...]

A reading is a gauge (percent, bytes, watts, ...) or a counter: bytes or joules since some start, whose name ends in
``_bytes`` or ``_joules``. Counters are kept as they are, so that the bytes of any interval are a difference and a lost
sample loses none of them; so they need no fast reading either. A sensor that a host does not have is named in
``missing`` with the reason and gives no reading, never a zero.
"""

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

UNITS = {
    "cpu.busy": "percent of all cores",
    "cpu.core_busy": "percent of one core",
    "cpu.io_wait": "percent of all cores that waited for a disk",
    "memory.used": "bytes",
    "swap.used": "bytes",
    "disk.read_bytes": "bytes since boot",
    "disk.written_bytes": "bytes since boot",
    "network.received_bytes": "bytes since boot",
    "network.sent_bytes": "bytes since boot",
    "object_store.used": "bytes",
    "object_store.spilled_bytes": "bytes since Ray's start",
    "process.cpu": "percent of one core, a Ray process",
    "process.memory": "bytes, resident",
    "gpu.busy": "percent of the time in which a kernel ran",
    "gpu.memory_busy": "percent of the time in which device memory was read or written",
    "gpu.memory_used": "bytes",
    "gpu.process_memory": "bytes, by card/process",
    "gpu.power": "watts",
    "gpu.energy_joules": "joules since the driver was loaded",
    "gpu.sm_clock": "MHz",
    "gpu.memory_clock": "MHz",
    "gpu.throttle_reasons": "NVML's bits of why clocks are low",
    "gpu.temperature": "degrees Celsius",
    "gpu.encoder": "percent",
    "gpu.decoder": "percent",
    "pcie.sent": "bytes a second, device to host, over a 20 ms window",
    "pcie.received": "bytes a second, host to device, over a 20 ms window",
    "pcie.generation": "link generation at the moment (falls when idle)",
    "pcie.width": "link lanes at the moment",
    "nvlink.sent_bytes": "bytes over all links since the driver was loaded",
    "nvlink.received_bytes": "bytes over all links since the driver was loaded",
}
"""Every metric a sampler may give, with its unit."""


class Reading(NamedTuple):
    """One value: the metric's name, the device it belongs to ("" for the host), the value in the metric's unit."""

    metric: str
    device: str
    value: float


class Sampler(Protocol):
    """What the recorder asks of a sampler."""

    missing: dict[str, str]

    def read(self) -> list[Reading]:
        """The readings of this moment that change fast; must not block for longer than a few milliseconds."""

    def read_slowly(self) -> list[Reading]:
        """The others: counters, and what takes its time to change or to read."""

    def facts(self) -> dict[str, Any]:
        """What does not change: sizes and names."""

    def close(self) -> None:
        """Let go of the sensors."""


class HostSampler:
    """CPU, memory, swap, disks and network interfaces of this host, by psutil."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._before = psutil.cpu_times(percpu=True)
        try:
            if not psutil.disk_io_counters(perdisk=True):
                self.missing["disk"] = "the system counts no disk bytes"
        except (OSError, RuntimeError) as error:
            self.missing["disk"] = str(error)

    def read(self) -> list[Reading]:
        """CPU percentages are over the time since the last call; memory in use is what no new process could have."""
        now = psutil.cpu_times(percpu=True)
        cores = [_shares(then, later) for then, later in zip(self._before, now, strict=False)]
        self._before = now
        memory = psutil.virtual_memory()
        readings = [Reading("cpu.busy", "", sum(busy for busy, _ in cores) / len(cores))]
        if hasattr(now[0], "iowait"):
            readings.append(Reading("cpu.io_wait", "", sum(waits for _, waits in cores) / len(cores)))
        readings += [Reading("cpu.core_busy", str(core), busy) for core, (busy, _) in enumerate(cores)]
        readings.append(Reading("memory.used", "", memory.total - memory.available))
        return readings

    def read_slowly(self) -> list[Reading]:
        """Swap in use, and the counters of disks and interfaces."""
        readings = [Reading("swap.used", "", psutil.swap_memory().used)]
        if "disk" not in self.missing:
            for disk, counts in psutil.disk_io_counters(perdisk=True).items():
                if is_whole_disk(disk):
                    readings.append(Reading("disk.read_bytes", disk, counts.read_bytes))
                    readings.append(Reading("disk.written_bytes", disk, counts.write_bytes))
        for interface, traffic in psutil.net_io_counters(pernic=True).items():
            readings.append(Reading("network.received_bytes", interface, traffic.bytes_recv))
            readings.append(Reading("network.sent_bytes", interface, traffic.bytes_sent))
        return readings

    def facts(self) -> dict[str, Any]:
        """Logical cores and bytes of memory."""
        return {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total}

    def close(self) -> None:
        """psutil holds nothing open."""


def _shares(before: Any, now: Any) -> tuple[float, float]:
    """Percent of a core's time between two readings that it was busy, and that it waited for a disk.

    Time of a guest is in the host's own too and counts once.
    """
    spent = {name: max(0.0, getattr(now, name) - getattr(before, name)) for name in now._fields if "guest" not in name}
    total = sum(spent.values())
    if not total:
        return 0.0, 0.0
    waits = spent.get("iowait", 0.0)
    return 100 * (total - spent["idle"] - waits) / total, 100 * waits / total


@functools.cache
def is_whole_disk(name: str) -> bool:
    """Whether ``name`` is a disk of its own: a partition, loop, memory or mapped device counts the same bytes twice."""
    if not sys.platform.startswith("linux"):
        return True
    return Path("/sys/block", name).exists() and not name.startswith(("loop", "ram", "zram", "dm-", "md", "sr"))
