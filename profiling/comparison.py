"""Two recordings beside each other: phases of one name, units of one name, and what only one of them found."""

from typing import Any

from profiling.page import histogram, summarize
from profiling.rules import findings
from profiling.shares import per_unit
from profiling.timeline import phase_table
from profiling.trace import Recording
from workbench.report import Report

PHASE_FIGURES = ("seconds", "cpu_mean_percent", "gpu_mean_percent", "gpu_joules", "memory_peak_gib", "disk_read_gib")
UNIT_FIGURES = ("seconds", "joules", "pcie_bytes", "disk_bytes", "network_bytes")


def add_comparison(report: Report, recording: Recording, against: Recording) -> None:
    """Add what differs of ``recording`` from ``against``: each figure of both, and the change in percent."""
    report.heading("Compared", "'before' is the recording that was given as 'against'.")
    now, before = summarize(recording), summarize(against)
    keys = [key for key, value in now.items() if isinstance(value, int | float)]
    report.table("Whole recordings", [_row({"figure": key}, before.get(key), now[key]) for key in keys])
    if rows := _by_name(_phases(against), _phases(recording), PHASE_FIGURES, "phase"):
        report.table("Phases of one name", rows)
    if rows := _by_name(_units(against), _units(recording), UNIT_FIGURES, "by"):
        report.table("Units of one name", rows)
    rules = {"before": {one.says for one in findings(against)}, "now": {one.says for one in findings(recording)}}
    rows = [{"finding": says, "gone": says not in rules["now"]} for says in sorted(rules["before"] ^ rules["now"])]
    if rows:
        report.table("Findings of one only", rows)
    cards = [(trace, card) for side in (against, recording) for trace in side.hosts.values() for card in trace.cards]
    if cards:
        note = "The first are those of before."
        report.figure("Utilisation before and now", histogram(cards, "gpu.busy", "percent of the time", 1.0), note)


def _phases(recording: Recording) -> dict[str, dict[str, Any]]:
    """The figures of the first phase of each name, on the host that told of it, or the first."""
    rows: dict[str, dict[str, Any]] = {}
    for phase in recording.phases:
        trace = recording.hosts.get(phase.host) or next(iter(recording.hosts.values()))
        rows.setdefault(phase.name, phase_table(trace, [phase])[0])
    return rows


def _units(recording: Recording) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in per_unit(recording):
        name = row["of"].partition(" of ")[0]
        rows.setdefault(f"{row['unit']} ({name})", row)
    return rows


def _by_name(
    before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], figures: tuple[str, ...], title: str
) -> list[dict[str, Any]]:
    return [
        _row({title: name, "figure": figure}, before[name].get(figure), now[name].get(figure))
        for name in now
        if name in before
        for figure in figures
        if before[name].get(figure) is not None or now[name].get(figure) is not None
    ]


def _row(names: dict[str, str], before: Any, now: Any) -> dict[str, Any]:
    change = f"{100 * (now - before) / before:+.1f}%" if before and now is not None else ""
    return {**names, "before": before, "now": now, "change": change}
