"""The GPU of an Apple silicon Mac, by what its driver publishes to everybody; no rights are needed.

Utilisation and memory are in the IORegistry. Energy is in IOReport, which Zeus' library reads
(https://github.com/ml-energy/zeus-apple-silicon): a model's estimate by Apple, in millijoules, and no sensor's.
"""

import plistlib
import subprocess
import sys
import time
from typing import Any

from profiling.samplers import Reading

ASK = ["/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator", "-a"]
ENERGY = ("gpu.power", "gpu.energy_joules")
SENSORS = {"gpu.busy": "Device Utilization %", "gpu.memory_used": "In use system memory"}


class AppleSampler:
    """The one GPU of a Mac; elsewhere it has no sensors and misses none."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._here = sys.platform == "darwin"
        self._energy: Any = None
        self._before: tuple[float, float] | None = None
        if self._here:
            self._open_energy()
            found = {reading.metric for reading in self.read_slowly()}
            self.missing |= {f"{metric} of card 0": "not published" for metric in SENSORS.keys() - found}

    def read(self) -> list[Reading]:
        """Nothing: a process is started for each answer."""
        return []

    def read_slowly(self) -> list[Reading]:
        """Utilisation, memory in use, energy, and the power since it was last read."""
        if not self._here:
            return []
        energy = self._read_energy()
        try:
            done = subprocess.run(ASK, capture_output=True, check=True, timeout=2)
        except (OSError, subprocess.SubprocessError) as error:
            self.missing["gpu"] = f"ioreg: {error}"
            return energy
        return parse(done.stdout) + energy

    def facts(self) -> dict[str, Any]:
        """The card counts as this host's only one."""
        return {}

    def close(self) -> None:
        """Let go of the energy counters."""
        self._energy = None

    def _open_energy(self) -> None:
        try:
            from zeus_apple_silicon import AppleEnergyMonitor

            self._energy = AppleEnergyMonitor()
            if self._energy.get_cumulative_energy().gpu_mj is None:
                self._no_energy("this chip does not publish it")
        except Exception as error:  # a chip that the library does not know, a macOS without these counters
            self._no_energy(f"zeus-apple-silicon: {error}")

    def _no_energy(self, why: str) -> None:
        self._energy = None
        self.missing |= {f"{metric} of card 0": why for metric in ENERGY}

    def _read_energy(self) -> list[Reading]:
        if self._energy is None:
            return []
        try:
            joules, now = float(self._energy.get_cumulative_energy().gpu_mj) / 1000, time.monotonic()
        except Exception as error:
            self._no_energy(f"zeus-apple-silicon: {error}")
            return []
        before, self._before = self._before, (now, joules)
        found = [Reading("gpu.energy_joules", "0", joules)]
        if before is not None and now > before[0]:
            found.append(Reading("gpu.power", "0", (joules - before[1]) / (now - before[0])))
        return found


def parse(answer: bytes) -> list[Reading]:
    """The readings in ``ioreg``'s property list; those that are not there are left out."""
    for accelerator in plistlib.loads(answer) if answer.strip() else []:
        published = accelerator.get("PerformanceStatistics", {})
        return [Reading(metric, "0", float(published[key])) for metric, key in SENSORS.items() if key in published]
    return []
