"""What a trace of steps comes to: time by kind, communication and its overlap, idle and why, memory, stragglers.

for row in rank_rows(read_traces(folder)):
    print(row["rank"], row["step_ms"], row["exposed_communication_ms"])
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from profiling.trace_events import Interval, Piece, RankTrace, gaps, kind_of, length, outermost, overlap, union

MS = 1e3
MIB = 2.0**20
STRAGGLES = 1.1
"""A rank that computes so much longer than the median of the ranks keeps the others waiting."""


def window(trace: RankTrace) -> Interval:
    """From the first step's start to the last one's end."""
    return trace.steps[0][0], trace.steps[-1][1]


def _within(trace: RankTrace) -> list[Piece]:
    """What ran in the window, and of what reaches over its ends the part inside."""
    start, end = window(trace)
    found = []
    for piece in trace.work:
        inside = min(piece.end, end) - max(piece.start, start)
        if 0 < inside < piece.seconds:
            share = inside / piece.seconds
            found.append(replace(piece, start=max(piece.start, start), seconds=inside, own=piece.own * share))
        elif inside > 0:
            found.append(piece)
    return found


def _split(trace: RankTrace) -> tuple[list[Interval], list[Interval]]:
    """When the device communicated, and when it did anything else."""
    pieces = [(kind_of(piece.name) == "communication", (piece.start, piece.end)) for piece in _within(trace)]
    return union([i for talks, i in pieces if talks]), union([i for talks, i in pieces if not talks])


def rank_rows(traces: list[RankTrace]) -> list[dict[str, Any]]:
    """A row a rank, in milliseconds a step: compute, communication and how much of it no compute hides, idle."""
    rows = []
    for trace in traces:
        steps = len(trace.steps)
        start, end = window(trace)
        talks, computes = _split(trace)
        hidden = overlap(talks, computes)
        idle = length(gaps(union(talks + computes), (start, end)))
        rows.append(
            {
                "rank": trace.rank,
                "steps": steps,
                "step_ms": (end - start) / MS / steps,
                "compute_ms": length(computes) / MS / steps,
                "communication_ms": length(talks) / MS / steps,
                "exposed_communication_ms": (length(talks) - hidden) / MS / steps,
                "overlap_percent": 100 * hidden / length(talks) if talks else None,
                "idle_ms": idle / MS / steps,
                "idle_percent": 100 * idle / (end - start),
            }
        )
    return rows


def stragglers(rows: list[dict[str, Any]]) -> list[str]:
    """Ranks that compute longer than the others, who wait for them in every collective."""
    if len(rows) < 2:
        return []
    found = []
    for row in rows:
        others = float(np.median([other["compute_ms"] for other in rows if other is not row]))
        if row["compute_ms"] > STRAGGLES * others:
            found.append(
                f"rank {row['rank']} computes {row['compute_ms']:.1f} ms a step, the others {others:.1f} ms, and waits "
                f"{row['communication_ms']:.1f} ms in collectives"
            )
    return found


def by_kind(trace: RankTrace) -> list[dict[str, Any]]:
    """Milliseconds a step of each kind of work, the most first, with the names that took most of it."""
    kinds: dict[str, Counter[str]] = {}
    for piece in _within(trace):
        kinds.setdefault(kind_of(piece.name), Counter())[piece.name] += piece.own  # type: ignore[assignment]
    total = sum(sum(names.values()) for names in kinds.values()) or 1
    rows = [
        {
            "kind": kind,
            "ms_a_step": sum(names.values()) / MS / len(trace.steps),
            "percent": 100 * sum(names.values()) / total,
            "most": ", ".join(
                f"{name[:60]} {spent / MS / len(trace.steps):.2f}" for name, spent in names.most_common(3)
            ),
        }
        for kind, names in kinds.items()
    ]
    return sorted(rows, key=lambda row: -float(row["percent"]))


def why_idle(trace: RankTrace, most: int = 5) -> list[dict[str, Any]]:
    """What the host did while the device did nothing: its outermost operators, or none (Python, the data, a wait)."""
    talks, computes = _split(trace)
    idle = gaps(union(talks + computes), window(trace))
    outer = outermost(trace.host) if trace.on_card else []
    spent: Counter[str] = Counter()
    for name in {piece.name for piece in outer}:
        spent[name] = overlap(idle, union([(p.start, p.end) for p in outer if p.name == name]))  # type: ignore[assignment]
    busy = overlap(idle, union([(piece.start, piece.end) for piece in outer]))
    spent["no operator: Python, loading data, or waiting"] = length(idle) - busy  # type: ignore[assignment]
    steps = len(trace.steps)
    return [{"host": name[:80], "idle_ms_a_step": time / MS / steps} for name, time in spent.most_common(most) if time]


def peak_memory(trace: RankTrace, device: str, most: int = 15) -> tuple[float, list[dict[str, Any]]]:
    """MiB allocated at the peak, and the largest allocations alive then, by the operator that made them.

    What was allocated before the trace is one row, with no operator.
    """
    events = trace.memory[device]
    peak_at = max(range(len(events)), key=lambda index: events[index][3])
    alive: dict[int, tuple[int, float]] = {}
    for when, address, size, _ in events[: peak_at + 1]:
        if size > 0:
            alive[address] = (size, when)
        else:
            alive.pop(address, None)
    total = events[peak_at][3]
    known: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    made = sorted(alive.values(), key=lambda one: one[1])
    for (size, _), maker in zip(made, _operators_at(trace.host, [when for _, when in made]), strict=True):
        known[maker] += size
        counts[maker] += 1
    rows = [
        {"operator": name, "mib": size / MIB, "allocations": counts[name]} for name, size in known.most_common(most)
    ]
    before = total - sum(known.values())
    if before > 0:
        rows.append({"operator": "allocated before the trace", "mib": before / MIB, "allocations": None})
    return total / MIB, sorted(rows, key=lambda row: -float(row["mib"] or 0))


def _operators_at(host: list[Piece], times: list[float]) -> list[str]:
    """The outermost operator that ran at each of ``times``, which rise, and the innermost: what was asked for, and what
    allocated."""
    coming = sorted(host, key=lambda piece: piece.start, reverse=True)
    running: list[Piece] = []
    found = []
    for when in times:
        while coming and coming[-1].start <= when:
            running.append(coming.pop())
        running = [piece for piece in running if piece.end >= when]
        names = [choose(running, key=lambda piece: piece.seconds).name for choose in (max, min) if running]
        found.append(" > ".join(dict.fromkeys(names)) or "no operator")
    return found
