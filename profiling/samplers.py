"""Samplers: what one host's sensors say at one moment.

    host = HostSampler()
    host.read()   # [Reading("cpu.busy", "", 37.5), Reading("disk.read_bytes", "nvme0n1", 8.1e9), ...]

A reading is a gauge (percent, bytes, watts, ...) or a counter: bytes since boot, whose name ends in ``_bytes``.
Counters are kept as they are, so that the bytes of any interval are a difference and a lost sample loses none of
them. A sensor that a host does not have is named in ``missing`` with the reason and gives no reading, never a zero.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

UNITS = {
    "cpu.busy": "percent of all cores",
    "cpu.core_busy": "percent of one core",
    "memory.used": "bytes",
    "swap.used": "bytes",
    "disk.read_bytes": "bytes since boot",
    "disk.written_bytes": "bytes since boot",
    "network.received_bytes": "bytes since boot",
    "network.sent_bytes": "bytes since boot",
    "gpu.busy": "percent of the time in which a kernel ran",
    "gpu.memory_busy": "percent of the time in which device memory was read or written",
    "gpu.memory_used": "bytes",
    "gpu.power": "watts",
    "gpu.sm_clock": "MHz",
    "gpu.memory_clock": "MHz",
    "gpu.temperature": "degrees Celsius",
    "pcie.sent": "bytes a second, device to host, over a 20 ms window",
    "pcie.received": "bytes a second, host to device, over a 20 ms window",
    "pcie.generation": "link generation at the moment (falls when idle)",
    "pcie.width": "link lanes at the moment",
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
        """All readings of this moment; must not block for longer than a few milliseconds."""

    def facts(self) -> dict[str, Any]:
        """What does not change: sizes and names."""

    def close(self) -> None:
        """Let go of the sensors."""


class HostSampler:
    """CPU, memory, swap, disks and network interfaces of this host, by psutil."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        psutil.cpu_percent(percpu=True)  # the first call has no interval to measure and returns zeros
        try:
            if not psutil.disk_io_counters(perdisk=True):
                self.missing["disk"] = "the system counts no disk bytes"
        except (OSError, RuntimeError) as error:
            self.missing["disk"] = str(error)

    def read(self) -> list[Reading]:
        """CPU percentages are over the time since the last call; memory in use is what no new process could have."""
        cores = psutil.cpu_percent(percpu=True)
        memory = psutil.virtual_memory()
        readings = [Reading("cpu.busy", "", sum(cores) / len(cores))]
        readings += [Reading("cpu.core_busy", str(core), busy) for core, busy in enumerate(cores)]
        readings.append(Reading("memory.used", "", memory.total - memory.available))
        readings.append(Reading("swap.used", "", psutil.swap_memory().used))
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


def is_whole_disk(name: str) -> bool:
    """Whether ``name`` is a disk of its own: a partition, loop, memory or mapped device counts the same bytes twice."""
    if not sys.platform.startswith("linux"):
        return True
    return Path("/sys/block", name).exists() and not name.startswith(("loop", "ram", "zram", "dm-", "md", "sr"))


class NvidiaSampler:
    """Every NVIDIA card of this host, by NVML. Without a driver it has no cards and says so in ``missing``.

    NVML measures PCIe traffic over 20 ms and blocks meanwhile, so a thread of its own reads it, every
    ``pcie_period`` seconds; between its readings the last value stands.
    """

    def __init__(self, pcie_period: float = 0.5) -> None:
        self.missing: dict[str, str] = {}
        self._handles: list[Any] = []
        self._sensors: list[tuple[str, str, Callable[[], float]]] = []
        self._traffic: Mapping[tuple[str, str], float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.pcie_cpu_seconds = 0.0
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.missing["gpu"] = f"NVML: {error}"
            return
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for index, handle in enumerate(self._handles):
            self._find_sensors(str(index), handle)
        links = [sensor for sensor in self._sensors if sensor[0] in ("pcie.sent", "pcie.received")]
        self._sensors = [sensor for sensor in self._sensors if sensor not in links]
        if links:
            self._thread = threading.Thread(target=self._read_links, args=(links, pcie_period), daemon=True)
            self._thread.start()

    def _find_sensors(self, card: str, handle: Any) -> None:
        """Keep each sensor that answers now; name the others."""
        nvml = self._nvml
        candidates: dict[str, Callable[[], float]] = {
            "gpu.busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu.memory_busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory,
            "gpu.memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu.power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu.sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "gpu.memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "gpu.temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "pcie.generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "pcie.width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            # NVML counts in KiB a second, as seen from the card: TX is device to host
            "pcie.sent": lambda: 1024 * nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_TX_BYTES),
            "pcie.received": lambda: 1024 * nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_RX_BYTES),
        }
        for metric, sensor in candidates.items():
            try:
                sensor()
            except nvml.NVMLError as error:
                self.missing[f"{metric} of card {card}"] = str(error)
            else:
                self._sensors.append((metric, card, sensor))

    def _read_links(self, links: list[tuple[str, str, Callable[[], float]]], period: float) -> None:
        import time

        while True:
            # a new dict each time: read() sees the old values or the new ones
            self._traffic = {(r.metric, r.device): r.value for r in self._ask(links)}
            self.pcie_cpu_seconds = time.thread_time()
            if self._stop.wait(period):
                return

    def _ask(self, sensors: list[tuple[str, str, Callable[[], float]]]) -> list[Reading]:
        readings = []
        for metric, card, sensor in sensors:
            try:
                readings.append(Reading(metric, card, float(sensor())))
            except self._nvml.NVMLError as error:  # it answered at the start: a gap now, and its name
                self.missing[f"{metric} of card {card}"] = str(error)
        return readings

    def read(self) -> list[Reading]:
        """Everything but PCIe traffic now, PCIe traffic as last read."""
        traffic = [Reading(metric, card, value) for (metric, card), value in self._traffic.items()]
        return self._ask(self._sensors) + traffic

    def facts(self) -> dict[str, Any]:
        """Name and bytes of memory of each card, in NVML's order."""
        return {
            "gpus": [
                {
                    "name": self._nvml.nvmlDeviceGetName(handle),
                    "memory_bytes": self._nvml.nvmlDeviceGetMemoryInfo(handle).total,
                }
                for handle in self._handles
            ]
        }

    def close(self) -> None:
        """End the PCIe thread and NVML."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        if self._handles:
            self._nvml.nvmlShutdown()
            self._handles, self._sensors = [], []
