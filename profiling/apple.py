"""The GPU of an Apple silicon Mac, by what its driver publishes to everybody (IORegistry); no rights are needed.

Utilisation and memory are there. Power is not: ``powermetrics`` has it, for root.
"""

import plistlib
import subprocess
import sys
from typing import Any

from profiling.samplers import Reading

ASK = ["/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator", "-a"]
SENSORS = {"gpu.busy": "Device Utilization %", "gpu.memory_used": "In use system memory"}


class AppleSampler:
    """The one GPU of a Mac; elsewhere it has no sensors and misses none."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._here = sys.platform == "darwin"
        if self._here:
            self.missing["gpu.power of card 0"] = "macOS tells it to root alone (powermetrics)"
            found = {reading.metric for reading in self.read_slowly()}
            self.missing |= {f"{metric} of card 0": "not published" for metric in SENSORS.keys() - found}

    def read(self) -> list[Reading]:
        """Nothing: a process is started for each answer."""
        return []

    def read_slowly(self) -> list[Reading]:
        """Utilisation, and memory in use."""
        if not self._here:
            return []
        try:
            done = subprocess.run(ASK, capture_output=True, check=True, timeout=2)
        except (OSError, subprocess.SubprocessError) as error:
            self.missing["gpu"] = f"ioreg: {error}"
            return []
        return parse(done.stdout)

    def facts(self) -> dict[str, Any]:
        """The card counts as this host's only one."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""


def parse(answer: bytes) -> list[Reading]:
    """The readings in ``ioreg``'s property list; those that are not there are left out."""
    for accelerator in plistlib.loads(answer) if answer.strip() else []:
        published = accelerator.get("PerformanceStatistics", {})
        return [Reading(metric, "0", float(published[key])) for metric, key in SENSORS.items() if key in published]
    return []
