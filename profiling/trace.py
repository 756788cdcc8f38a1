"""A recording read back: samples of each host, bytes and loads over any interval.

trace = read_samples(run_folder / "artifacts" / "samples")
trace["system-a"].total("disk.read_bytes", start, end)   # bytes
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import UserError
from workbench.files import read_json

Series = tuple[np.ndarray, np.ndarray]
"""Times (epoch seconds, increasing) and values, of one length."""


@dataclass(frozen=True)
class Phase:
    """A named interval in epoch seconds."""

    name: str
    start: float
    end: float


@dataclass
class HostTrace:
    """The samples of one host by (metric, device), and the facts of its ``host.json``."""

    host: str
    facts: dict[str, Any]
    series: dict[tuple[str, str], Series] = field(default_factory=dict)

    @property
    def span(self) -> tuple[float, float]:
        """Epoch seconds of the first and the last sample."""
        times = [times for times, _ in self.series.values()]
        return min(t[0] for t in times), max(t[-1] for t in times)

    def devices(self, metric: str) -> list[str]:
        """The devices that gave ``metric``."""
        return sorted(device for name, device in self.series if name == metric)

    def values(self, metric: str, device: str, start: float, end: float) -> np.ndarray:
        """The values sampled within the interval; empty where there were none."""
        times, values = self.series.get((metric, device), (np.empty(0), np.empty(0)))
        return values[(times >= start) & (times <= end)]

    def total(self, metric: str, start: float, end: float, devices: list[str] | None = None) -> float | None:
        """Bytes that a counter rose by in the interval, over ``devices`` (default all); None without such a sensor.

        Between two samples a counter is taken to rise evenly. Outside the recording nothing is known and nothing added.
        """
        devices = self.devices(metric) if devices is None else devices
        known = [self.series[metric, device] for device in devices if (metric, device) in self.series]
        if not known:
            return None
        sums = ((times, np.concatenate([[0.0], np.cumsum(increases(values))])) for times, values in known)
        return float(sum(np.interp(end, times, sums_) - np.interp(start, times, sums_) for times, sums_ in sums))

    def rate(self, metric: str, devices: list[str] | None = None) -> Series | None:
        """A counter's bytes a second between consecutive samples, summed over ``devices``; at the later sample's time.

        Devices are sampled together, so those that came late or left early count as zero before and after.
        """
        devices = self.devices(metric) if devices is None else devices
        known = [self.series[metric, device] for device in devices if (metric, device) in self.series]
        if not known:
            return None
        grid = np.unique(np.concatenate([times for times, _ in known]))
        summed = np.zeros(max(0, len(grid) - 1))
        for times, values in known:
            if len(times) > 1:
                rates = increases(values) / np.diff(times)
                position = np.searchsorted(times, grid[1:], side="left")
                inside = (position >= 1) & (position < len(times))
                summed[inside] += rates[position[inside] - 1]
        return grid[1:], summed


def increases(counter: np.ndarray) -> np.ndarray:
    """Rises between consecutive values of a counter; after a restart from zero the new value is the rise."""
    rises = np.diff(counter)
    return np.where(rises < 0, counter[1:], rises)


def read_samples(folder: Path) -> dict[str, HostTrace]:
    """The trace of each host from a recording's ``samples`` folder; hosts without a whole part are left out.

    Raises UserError if the folder holds no samples.
    """
    import pyarrow.parquet as pq

    traces = {}
    for part_folder in sorted(path for path in folder.glob("*") if path.is_dir()):
        parts = sorted(part_folder.glob("part-*.parquet"))
        if not parts:
            continue
        facts = part_folder / "host.json"
        trace = HostTrace(part_folder.name, read_json(facts) if facts.exists() else {})
        frame = pq.ParquetDataset(parts).read().to_pandas().sort_values("time", kind="stable")
        for (metric, device), rows in frame.groupby(["metric", "device"], observed=True):
            trace.series[str(metric), str(device)] = rows["time"].to_numpy(), rows["value"].to_numpy()
        traces[trace.host] = trace
    if not traces:
        raise UserError(f"no samples under {folder}: give the run folder of a 'workbench profile record'")
    return traces


def read_phases(file: Path) -> list[Phase]:
    """Phases from JSON lines ``{"name": ..., "start": epoch seconds, "end": epoch seconds}``, in order of start.

    Raises UserError with file and line for a line that is none.
    """
    phases = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            phase = Phase(str(row["name"]), float(row["start"]), float(row["end"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{file}:{number}: not a phase ({error!r}): write {{"name": "load", "start": 1.5, "end": 2.5}}'
            ) from None
        if phase.end < phase.start:
            raise UserError(f"{file}:{number}: phase '{phase.name}' ends before it starts")
        phases.append(phase)
    return sorted(phases, key=lambda phase: phase.start)
