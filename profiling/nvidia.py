"""NVIDIA cards, by NVML."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling.samplers import Reading

ALL_LINKS = 0xFFFFFFFF
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"
MOST_LANES = 16
"""Linux tells 255 where it does not know."""
Sensor = Callable[[], float]


class NvidiaSampler:
    """Every NVIDIA card of this host. Without a driver it has no cards and says so in ``missing``.

    NVML measures PCIe traffic over 20 ms a direction and blocks meanwhile, so a thread of its own reads it, every
    ``pcie_period`` seconds or as fast as the counters let it; each of its readings is handed out once.
    """

    def __init__(self, pcie_period: float = 0.5) -> None:
        self.missing: dict[str, str] = {}
        self._handles: dict[int, Any] = {}
        self._gpus: list[dict[str, Any]] = []
        self._running = False
        self._fast: list[tuple[str, str, Sensor]] = []
        self._slow: list[tuple[str, str, Sensor]] = []
        self._traffic: list[Reading] = []
        self._rounds, self._begun = 0, time.monotonic()
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
        self._running = True
        links: list[tuple[str, str, Sensor]] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            except pynvml.NVMLError as error:  # off its bus, or without power: the others are there
                self.missing[f"card {index}"] = str(error)
                self._gpus.append({"name": "unknown"})
                continue
            self._handles[index] = handle
            self._gpus.append(self._facts_of(handle))
            self._fast += self._answering(str(index), self._fast_sensors(handle))
            self._slow += self._answering(str(index), self._slow_sensors(handle))
            links += self._answering(str(index), self._link_sensors(handle))
        if links:
            self._thread = threading.Thread(target=self._read_links, args=(links, pcie_period), daemon=True)
            self._thread.start()

    def _fast_sensors(self, handle: Any) -> dict[str, Sensor]:
        nvml = self._nvml
        return {
            "gpu.busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu.memory_busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory,
            "gpu.memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu.power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu.energy_joules": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
            "gpu.sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "gpu.throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }

    def _slow_sensors(self, handle: Any) -> dict[str, Sensor]:
        nvml = self._nvml

        def over_links(field: int) -> Sensor:
            def read() -> float:
                [value] = nvml.nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS)])
                if value.nvmlReturn != nvml.NVML_SUCCESS:
                    raise nvml.NVMLError(value.nvmlReturn)
                return float(1024 * value.value.ullVal)

            return read

        return {
            "gpu.memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "gpu.temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "gpu.encoder": lambda: nvml.nvmlDeviceGetEncoderUtilization(handle)[0],
            "gpu.decoder": lambda: nvml.nvmlDeviceGetDecoderUtilization(handle)[0],
            "pcie.generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "pcie.width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            "nvlink.sent_bytes": over_links(nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
            "nvlink.received_bytes": over_links(nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
        }

    def _link_sensors(self, handle: Any) -> dict[str, Sensor]:
        """NVML counts in KiB a second, as seen from the card: TX is device to host."""
        nvml = self._nvml
        return {
            "pcie.sent": lambda: 1024 * nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_TX_BYTES),
            "pcie.received": lambda: 1024 * nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_RX_BYTES),
        }

    def _answering(self, card: str, candidates: dict[str, Sensor]) -> list[tuple[str, str, Sensor]]:
        """Keep each sensor that answers now; name the others."""
        kept = []
        for metric, sensor in candidates.items():
            try:
                sensor()
            except self._nvml.NVMLError as error:
                self.missing[f"{metric} of card {card}"] = str(error)
            else:
                kept.append((metric, card, sensor))
        return kept

    def _read_links(self, links: list[tuple[str, str, Sensor]], period: float) -> None:
        while True:
            begun = time.monotonic()
            self._traffic = self._ask(links)  # a new list each time: read() takes the old one or the new one
            self._rounds += 1
            self.pcie_cpu_seconds = time.thread_time()
            if self._stop.wait(max(0.0, begun + period - time.monotonic())):
                return

    def _ask(self, sensors: list[tuple[str, str, Sensor]]) -> list[Reading]:
        readings = []
        for metric, card, sensor in sensors:
            try:
                readings.append(Reading(metric, card, float(sensor())))
            except self._nvml.NVMLError as error:  # it answered at the start: a gap now, and its name
                self.missing[f"{metric} of card {card}"] = f"{error}, in the middle of the recording"
        return readings

    def read(self) -> list[Reading]:
        """What changes fast, now, and PCIe traffic where it was read since the last call."""
        traffic, self._traffic = self._traffic, []
        return self._ask(self._fast) + traffic

    def read_slowly(self) -> list[Reading]:
        """Counters, temperature, link, and the memory of each process."""
        return self._ask(self._slow) + self._processes()

    def _processes(self) -> list[Reading]:
        readings = []
        for card, handle in self._handles.items():
            try:
                running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._nvml.NVMLError as error:
                self.missing[f"gpu.process_memory of card {card}"] = str(error)
                continue
            for process in running:
                if process.usedGpuMemory is None:  # some drivers tell the process and not its memory
                    self.missing[f"gpu.process_memory of card {card}"] = "the driver does not tell it"
                else:
                    readings.append(Reading("gpu.process_memory", f"{card}/{process.pid}", process.usedGpuMemory))
        return readings

    def facts(self) -> dict[str, Any]:
        """Each card in NVML's order: name, UUID, bytes of memory, widest and fastest link, limits, as they were at
        the start; and the rate at which PCIe traffic is read."""
        seconds = time.monotonic() - self._begun
        facts: dict[str, Any] = {"gpus": self._gpus}
        if self._rounds:
            facts["pcie_hertz"] = round(self._rounds / seconds, 2)
        return facts

    def _facts_of(self, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        facts: dict[str, Any] = {}
        limits: dict[str, Callable[[], Any]] = {
            "name": lambda: nvml.nvmlDeviceGetName(handle),
            "uuid": lambda: nvml.nvmlDeviceGetUUID(handle),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "pcie_generation_max": lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            "pcie_width_max": lambda: card_width(nvml, handle),
            "power_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "sm_clock_max": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        }
        for name, ask in limits.items():
            try:
                facts[name] = ask()
            except nvml.NVMLError:
                facts[name] = None
        return facts | {"name": facts["name"] or "unknown"}

    def close(self) -> None:
        """End the PCIe thread and NVML."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        if self._running:
            self._nvml.nvmlShutdown()
            self._running, self._handles, self._fast, self._slow = False, {}, [], []


def card_width(nvml: Any, handle: Any) -> int:
    """The lanes that the card itself has, by Linux; NVML, asked where Linux is silent, tells no more than the slot has.

    Source: the kernel's Documentation/ABI/testing/sysfs-bus-pci, ``max_link_width``. Raises NVMLError where neither
    tells.
    """
    domain, _, rest = nvml.nvmlDeviceGetPciInfo(handle).busId.lower().partition(":")
    device = PCI_DEVICES / f"{domain[-4:]}:{rest}"
    try:
        vendor, width = (device / "vendor").read_text().strip(), int((device / "max_link_width").read_text())
    except (OSError, ValueError):
        vendor, width = "", 0
    return width if vendor == NVIDIA and 0 < width <= MOST_LANES else int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
