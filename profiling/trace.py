"""A recording read back: samples of each host on one time axis, what was marked on it, bytes and loads of any interval.

recording = read_recording(run_folder / "artifacts" / "samples")
recording.hosts["system-a"].total("disk.read_bytes", start, end)   # bytes
recording.phases, recording.marks
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from profiling.cluster_recording import ACTORS, CLOCKS
from workbench.errors import UserError
from workbench.files import read_record
from workbench.marks import numbers

Series = tuple[np.ndarray, np.ndarray]
"""Times (epoch seconds, increasing) and values, of one length."""

NOTHING: Series = (np.empty(0), np.empty(0))

_ALWAYS = {"name", "value", "host", "pid"}
TOLD = {
    "mark": _ALWAYS | {"figures"},
    "begin": _ALWAYS | {"id"},
    "end": _ALWAYS | {"id", "began", "monotonic", "figures"},
}
"""What a line of ``marks.jsonl`` must say, by its kind."""


@dataclass(frozen=True)
class Phase:
    """A named interval in epoch seconds; ``figures`` are what was done in it, such as tokens. ``whole`` is False where
    its end was never told: its process was killed, or goes on."""

    name: str
    start: float
    end: float
    host: str = ""
    process: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    whole: bool = True

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Mark:
    """A named moment: ``name`` came to ``value``, having done ``figures`` since the mark of its name before."""

    name: str
    value: str | float
    time: float
    host: str = ""
    process: int = 0
    figures: dict[str, float] = field(default_factory=dict)


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

    @property
    def cards(self) -> list[str]:
        """The cards that gave any reading, by their index."""
        return _in_order({device for metric, device in self.series if metric in ("gpu.busy", "gpu.memory_used")})

    def card_facts(self, card: str) -> dict[str, Any]:
        """Name, memory and limits of a card; empty where they are not known."""
        cards = self.facts.get("gpus", [])
        return dict(cards[int(card)]) if int(card) < len(cards) else {}

    def devices(self, metric: str) -> list[str]:
        """The devices that gave ``metric``."""
        return _in_order({device for name, device in self.series if name == metric})

    def get(self, metric: str, device: str = "") -> Series:
        """The series of a sensor; empty where the host lacks it."""
        return self.series.get((metric, device), NOTHING)

    def values(self, metric: str, device: str, start: float, end: float) -> np.ndarray:
        """The values sampled within the interval; empty where there were none."""
        times, values = self.get(metric, device)
        return values[(times >= start) & (times <= end)]

    def total(self, metric: str, start: float, end: float, devices: list[str] | None = None) -> float | None:
        """What a counter rose by in the interval, over ``devices`` (default all); None without such a sensor.

        Between two samples a counter is taken to rise evenly. Outside the recording nothing is known and nothing added.
        """
        known = self._known(metric, devices)
        if not known:
            return None
        sums = ((times, np.concatenate([[0.0], np.cumsum(increases(values))])) for times, values in known)
        return float(sum(np.interp(end, times, sums_) - np.interp(start, times, sums_) for times, sums_ in sums))

    def integral(self, metric: str, start: float, end: float, devices: list[str] | None = None) -> float | None:
        """A gauge times seconds over the interval (watts give joules), by trapezoids; None without such a sensor."""
        known = self._known(metric, devices)
        if not known:
            return None
        areas = (
            (times, np.concatenate([[0.0], np.cumsum(np.diff(times) * (values[1:] + values[:-1]) / 2)]))
            for times, values in known
        )
        return float(sum(np.interp(end, times, area) - np.interp(start, times, area) for times, area in areas))

    def joules(self, start: float, end: float, card: str) -> float | None:
        """Energy of a card in the interval: its own counter as far as that goes, and the integral of its power where
        it has none or failed in the middle; None without either."""
        counted = self.total("gpu.energy_joules", start, end, [card])
        if counted is None:
            return self.integral("gpu.power", start, end, [card])
        last = float(self.get("gpu.energy_joules", card)[0][-1])
        after = self.integral("gpu.power", max(start, last), end, [card]) if last < end else None
        return counted + (after or 0.0)

    def rate(self, metric: str, devices: list[str] | None = None) -> Series | None:
        """A counter's bytes a second between consecutive samples, summed over ``devices``; at the later sample's time.

        Devices are sampled together, so those that came late or left early count as zero before and after.
        """
        known = self._known(metric, devices)
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

    def _known(self, metric: str, devices: list[str] | None) -> list[Series]:
        devices = self.devices(metric) if devices is None else devices
        return [self.series[metric, device] for device in devices if (metric, device) in self.series]


def _in_order(devices: set[str]) -> list[str]:
    """By name, numbers in it by their value: card 10 comes after card 9."""

    def pieces(device: str) -> list[tuple[int, str]]:
        return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"([0-9]+)", device)]

    return sorted(devices, key=pieces)


def increases(counter: np.ndarray) -> np.ndarray:
    """Rises between consecutive values of a counter; after a restart from zero the new value is the rise."""
    rises = np.diff(counter)
    return np.where(rises < 0, counter[1:], rises)


@dataclass
class Recording:
    """All hosts, and what was marked, in order of time. ``clock_error`` is by how many seconds hosts may be off."""

    hosts: dict[str, HostTrace]
    phases: list[Phase] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    actors: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    clock_error: float = 0.0

    @property
    def span(self) -> tuple[float, float]:
        """Epoch seconds of the first and the last sample of any host."""
        spans = [trace.span for trace in self.hosts.values()]
        return min(start for start, _ in spans), max(end for _, end in spans)

    def process_name(self, host: str, process: str) -> str:
        """What a process is: its actor, job and trial, as far as they were seen."""
        ran = self.hosts[host].facts.get("processes", {}).get(process, {}) if host in self.hosts else {}
        actor = self.actors.get(host, {}).get(process, {})
        what = actor.get("name") or actor.get("class") or ran.get("runs") or "process"
        job = actor.get("job") or ran.get("job")
        trial = next((p.name for p in self.phases if p.host == host and str(p.process) == process
                      and p.name.startswith("trial ")), "")  # fmt: skip
        return f"{what} {process}" + (f", job {job}" if job else "") + (f", {trial}" if trial else "")


def samples_folder(folder: Path) -> Path:
    """Where the samples of a run folder lie; the folder itself where it is no run's."""
    below = folder / "artifacts" / "samples"
    return below if below.is_dir() else folder


def read_recording(folder: Path) -> Recording:
    """The recording in a run folder or its ``samples``; hosts without a whole part are left out.

    A part that is damaged is left out and named in the host's facts as ``damaged_parts``. Raises UserError if there are
    no samples.
    """
    folder = samples_folder(folder)
    clocks = read_record(folder / CLOCKS) or {}
    hosts, axes, unread = {}, dict[str, _Axis](), list[str]()
    for part_folder in sorted(path for path in folder.glob("*") if path.is_dir()):
        facts = read_record(part_folder / "host.json") or {}
        axis = axes[part_folder.name] = _Axis(facts.get("clock"), clocks.get("offsets", {}).get(part_folder.name, []))
        series, damaged = _read_series(part_folder, axis)
        if damaged:
            facts["damaged_parts"] = damaged
            unread += damaged
        if series:
            hosts[part_folder.name] = HostTrace(part_folder.name, facts, series)
    if not hosts:
        why = f"they cannot be read ({unread[0]})" if unread else "give the run folder of a 'workbench profile record'"
        raise UserError(f"no samples under {folder}: {why}")
    if reference := clocks.get("reference"):
        axes.setdefault(reference["host"], _Axis(reference, []))
    recording = Recording(hosts, actors=read_record(folder / ACTORS) or {})
    recording.offsets = {host: axis.offset for host, axis in axes.items() if host in hosts}
    recording.clock_error = max((axis.error for axis in axes.values()), default=0.0)
    told = list(_read_marks(folder, axes))
    recording.marks = sorted((mark for mark in _marks(told)), key=lambda mark: mark.time)
    recording.phases = sorted(_phases(told, recording.span[1]), key=lambda phase: (phase.start, -phase.end))
    return recording


class _Axis:
    """A host's clock as the recording has it: the anchor of its steady axis, and its offsets over the reference's."""

    def __init__(self, clock: dict[str, Any] | None, offsets: list[dict[str, float]]) -> None:
        self._clock, self._offsets = clock, offsets
        self.offset = float(np.median([one["offset"] for one in offsets])) if offsets else 0.0
        self.error = max((one["error"] for one in offsets), default=0.0)

    def place(self, times: np.ndarray) -> np.ndarray:
        """Times on the host's axis as times on the reference's: clocks drift evenly between two measurements."""
        if not self._offsets:
            return times
        measured = [one["time"] for one in self._offsets]
        return times - np.interp(times, measured, [one["offset"] for one in self._offsets])

    def time_of(self, told: dict[str, Any]) -> float:
        """When something was told: as its recorder placed it, else by the monotonic clock where the anchor is known."""
        if "axis" in told:
            at = float(told["axis"])
        elif self._clock is not None:
            at = self._clock["wall"] + told["monotonic"] - self._clock["monotonic"]
        else:
            return float(told["time"])
        return float(self.place(np.array([at]))[0])


def _read_series(folder: Path, axis: _Axis) -> tuple[dict[tuple[str, str], Series], list[str]]:
    """A host's series, and the names of the parts that cannot be read."""
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq

    frames, damaged = [], []
    for part in sorted(folder.glob("part-*.parquet")):
        try:
            frames.append(pq.read_table(part, columns=["time", "metric", "device", "value"]).to_pandas())
        except (pa.ArrowException, OSError) as error:
            damaged.append(f"{part.name}: {str(error).splitlines()[0]}")
    if not frames:
        return {}, damaged
    frame = pandas.concat(frames).astype({"metric": str, "device": str}).sort_values("time", kind="stable")
    return {
        (str(metric), str(device)): (axis.place(rows["time"].to_numpy()), rows["value"].to_numpy())
        for (metric, device), rows in frame.groupby(["metric", "device"], observed=True)
    }, damaged


def _read_marks(folder: Path, axes: dict[str, _Axis]) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*/marks.jsonl")):
        for line in file.read_text(errors="replace").splitlines():
            try:
                told = json.loads(line)
                told["at"] = axes.get(told["host"], _Axis(None, [])).time_of(told)
                whole = TOLD[told["kind"]] <= told.keys()
            except (ValueError, KeyError, TypeError):
                continue  # cut off when its host died
            if whole:
                yield told


def _marks(told: list[dict[str, Any]]) -> Iterator[Mark]:
    for one in told:
        if one["kind"] == "mark":
            yield Mark(one["name"], one["value"], one["at"], one["host"], one["pid"], numbers(one["figures"]))


def _phases(told: list[dict[str, Any]], end: float) -> Iterator[Phase]:
    ends = {(one["host"], one["id"]): one for one in told if one["kind"] == "end"}
    for one in told:
        name, host, process = f"{one['name']} {one['value']}".strip(), one["host"], one["pid"]
        if one["kind"] == "begin" and (host, one["id"]) not in ends:
            yield Phase(name, one["at"], max(end, one["at"]), host, process, whole=False)
        elif one["kind"] == "end":
            start = one["at"] - (one["monotonic"] - one["began"])
            yield Phase(name, start, one["at"], host, process, numbers(one["figures"]))


def read_phases(file: Path) -> list[Phase]:
    """Phases from JSON lines ``{"name": ..., "start": epoch seconds, "end": epoch seconds}``, in order of start.

    Raises UserError for a file that is no text, with its line for a line that is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"phases: {file} cannot be read ({error}): give a file of JSON lines, one a phase") from None
    phases = []
    for number, line in enumerate(lines, 1):
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
