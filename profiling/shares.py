"""What a recording comes to in figures: shares of a card's time, and bytes and joules by step, token or document."""

from collections.abc import Callable
from typing import Any

import numpy as np

from profiling.trace import HostTrace, Mark, Recording

IDLE_PERCENT = 5.0
FULL_PERCENT = 90.0
WAITS_PERCENT = 20.0

SLACK_SECONDS = 1.0
"""A phase may begin so long before the first sample: the recorder starts with it."""
NO_WORK = {"said", "traced"}
"""Marks that tell of something and not of work done."""
VIRTUAL = ("veth", "docker", "br-", "virbr", "cni", "flannel", "ifb", "dummy", "utun", "awdl", "llw", "bridge")

POWER = 0x4 | 0x80
"""NVML: software power cap, hardware power brake."""
HEAT = 0x20 | 0x40
"""NVML: software and hardware thermal slowdown."""
SLOWDOWN = 0x8
"""NVML: hardware slowdown, for heat, power or a signal from outside."""

GIGABYTES_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.98462, 4: 1.96923, 5: 3.93846, 6: 7.5625}
"""PCI Express, one direction, after line coding (8b/10b, from generation 3 on 128b/130b, in 6 242 of 256 bytes)."""


def link_bytes(generation: float, width: float) -> float | None:
    """What a PCIe link can carry at most in one direction, in bytes a second; packet headers take some of it.

    None for a generation that is none, as some virtual machines tell.
    """
    lane = GIGABYTES_PER_LANE.get(int(generation))
    return None if lane is None else lane * width * 1e9


def share(condition: np.ndarray) -> float | None:
    """Percent of the samples for which it holds; None without samples."""
    return float(100 * np.mean(condition)) if len(condition) else None


def card_shares(trace: HostTrace, card: str, start: float, end: float) -> dict[str, Any]:
    """Percent of the time: idle, memory controller busy, throttled; None where a sensor is missing.

    ``waits_for_cores`` is idle while a core of the host is full, ``waits_for_disk`` idle while cores wait for one, and
    ``waits_for_else`` the rest of idle.
    """
    busy = trace.values("gpu.busy", card, start, end)
    idle = busy < IDLE_PERCENT
    memory = trace.values("gpu.memory_busy", card, start, end)
    reasons = trace.values("gpu.throttle_reasons", card, start, end).astype(int)
    cores, disk = _host_waits(trace, card, start, end)
    return {
        "idle": share(idle),
        "busy_mean": float(busy.mean()) if len(busy) else None,
        "memory_busy_mean": float(memory.mean()) if len(memory) else None,
        "power_capped": share(reasons & POWER > 0),
        "too_hot": share(reasons & HEAT > 0),
        "slowed_down": share(reasons & SLOWDOWN > 0),
        "waits_for_cores": share(idle & cores) if len(cores) == len(idle) else None,
        "waits_for_disk": share(idle & disk & ~cores) if len(cores) == len(idle) else None,
        "waits_for_else": share(idle & ~cores & ~disk) if len(cores) == len(idle) else None,
    }


def _host_waits(trace: HostTrace, card: str, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """At each of the card's samples: whether a core was full, and whether cores waited for a disk."""
    times, _ = trace.get("gpu.busy", card)
    times = times[(times >= start) & (times <= end)]
    cores = [trace.get("cpu.core_busy", core) for core in trace.devices("cpu.core_busy")]
    if not cores or not len(times):
        return np.empty(0, bool), np.empty(0, bool)
    hottest = np.max([np.interp(times, when, busy) for when, busy in cores], axis=0)
    when, waits = trace.get("cpu.io_wait")
    waiting = np.interp(times, when, waits) if len(when) else np.zeros(len(times))
    return hottest >= FULL_PERCENT, waiting >= WAITS_PERCENT


def per_unit(recording: Recording) -> list[dict[str, Any]]:
    """Seconds, bytes and joules for each step, token, document: of every series of marks, and every phase with figures.

    A series lasts from its first mark to its last, and what came with the first was done before it. Marks without a
    number, such as the batches of several workers, are one series over all processes. Bytes and joules are those of all
    hosts meanwhile; PCIe bytes are estimated from windows of 20 ms. A phase that began before the recording has none.
    """
    rows = []
    series: dict[tuple[str, str, int], list[Mark]] = {}
    for mark in recording.marks:
        if mark.name not in NO_WORK:
            of = (mark.host, mark.process) if mark.value != "" else ("", 0)
            series.setdefault((mark.name, *of), []).append(mark)
    for (name, *_), marks in sorted(series.items()):
        counts = {name: float(len(marks) - 1)}
        for figure in sorted({key for mark in marks for key in mark.figures}):
            counts[_one(figure)] = sum(mark.figures.get(figure, 0.0) for mark in marks[1:])
        if len(marks) > 1:
            rows += _rows(recording, f"{name}s of {_processes(marks)}", counts, marks[0].time, marks[-1].time)
    for phase in recording.phases:
        counts = {_one(figure): count for figure, count in phase.figures.items()}
        if phase.start >= recording.span[0] - SLACK_SECONDS:
            rows += _rows(recording, phase.name, counts, phase.start, phase.end)
    return rows


def _processes(marks: list[Mark]) -> str:
    found = {(mark.host, mark.process) for mark in marks}
    return f"{len(found)} processes" if len(found) > 1 else f"process {marks[0].process}"


def _one(plural: str) -> str:
    return plural.removesuffix("s")


def _rows(recording: Recording, what: str, counts: dict[str, float], start: float, end: float) -> list[dict[str, Any]]:
    joules = total_joules(recording, start, end)
    sums = {
        "joules": joules,
        "pcie_bytes": over_hosts(
            recording, lambda t: add(t.integral("pcie.received", start, end), t.integral("pcie.sent", start, end))
        ),
        "disk_bytes": over_hosts(
            recording, lambda t: add(t.total("disk.read_bytes", start, end), t.total("disk.written_bytes", start, end))
        ),
        "network_bytes": over_hosts(recording, lambda t: t.total("network.sent_bytes", start, end, interfaces(t)[0])),
    }
    return [
        {
            "of": what, "unit": unit, "count": count, "seconds": (end - start) / count,
            **{name: None if value is None else value / count for name, value in sums.items()},
        }
        for unit, count in counts.items()
        if count > 0
    ]  # fmt: skip


def interfaces(trace: HostTrace) -> tuple[list[str], list[str]]:
    """Interfaces that lead out of the host, and loopback. Bridges and container ends, which count traffic of the
    outer ones or of none a second time, are in neither."""
    names = trace.devices("network.sent_bytes")
    return [n for n in names if not n.startswith(("lo", *VIRTUAL))], [n for n in names if n in ("lo", "lo0")]


def total_joules(recording: Recording, start: float, end: float) -> float | None:
    """Energy of all cards in the interval; None where no card tells it."""
    known = [trace.joules(start, end, card) for trace in recording.hosts.values() for card in trace.cards]
    return sum(joules for joules in known if joules is not None) if any(j is not None for j in known) else None


def over_hosts(recording: Recording, ask: Callable[[HostTrace], float | None]) -> float | None:
    """The sum of what hosts answer; None where none does."""
    return add(*(ask(trace) for trace in recording.hosts.values()))


def add(*values: float | None) -> float | None:
    """The sum of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
