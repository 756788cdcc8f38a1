"""A recording as sections of a report: findings, timelines, histograms, shares of time, bytes and joules by unit."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from profiling.rules import findings
from profiling.shares import card_shares, per_unit
from profiling.timeline import COLOURS, GIB, MB, phase_table, timeline_figure
from profiling.trace import HostTrace, Phase, Recording
from workbench.report import Report
from workbench.runs import Summary

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_UNIT_ROWS = 60


def add_pages(report: Report, recording: Recording) -> None:
    """Add everything that a recording shows to ``report``, the findings first."""
    found = findings(recording)
    rows = [
        {"host": one.host, "finding": one.says, "evidence": one.evidence, "what to try": one.advice} for one in found
    ]
    if rows:
        report.table("Findings", rows, note="What the rules saw; each has its evidence beside it.")
    else:
        report.text("Findings", "No rule saw anything wrong. What no sensor tells, no rule can see.")
    for trace in recording.hosts.values():
        figure = timeline_figure(
            trace, recording.phases, recording.marks, recording.span[0], partial(recording.process_name, trace.host)
        )
        report.figure(f"Timeline of {trace.host}", figure, note=describe(trace, recording))
        start, end = trace.span
        phases = recording.phases or [Phase("whole recording", start, end)]
        report.table(f"Phases on {trace.host}", phase_table(trace, phases))
    cards = [(trace, card) for trace in recording.hosts.values() for card in trace.cards]
    if cards:
        report.table("Shares of each card's time", [_share_row(*card) for card in cards], note=SHARES_NOTE)
        report.figure("Utilisation of the cards", histogram(cards, "gpu.busy", "percent of the time", 1.0))
        report.figure("PCIe traffic", _traffic(cards), note="Windows of 20 ms: bursts between them are not seen.")
    if units := per_unit(recording):
        note = "Bytes and joules are those of all hosts meanwhile, whoever moved and used them."
        report.table("By step, token and document", units[:MAX_UNIT_ROWS], note=note)
    missing = [
        {"host": trace.host, "sensor": sensor, "why": why}
        for trace in recording.hosts.values()
        for sensor, why in trace.facts.get("missing", {}).items()
    ]
    if missing:
        report.table("Not measured", missing)


SHARES_NOTE = (
    "Percent of the samples. NVML's utilisation is the time in which any kernel ran, and cannot say what bounds a "
    "kernel: see 'profile roofline' and 'profile trace'. Idle is split by what the host did meanwhile."
)


def describe(trace: HostTrace, recording: Recording) -> str:
    """A sentence under a timeline: what the host has, how it was sampled, and what that cost."""
    note = f"{trace.facts.get('cores', '?')} cores, {trace.facts.get('memory_bytes', 0) / GIB:.1f} GiB of memory"
    for card in trace.facts.get("gpus", []):
        memory = card.get("memory_bytes")  # not told where card and host share it
        note += f", {card['name']}" + (f" {memory / GIB:.0f} GiB" if memory else "")
    if achieved := trace.facts.get("achieved_hertz"):
        note += f". {achieved:g} samples a second of {trace.facts['hertz']:g} asked for"
    if pcie := trace.facts.get("pcie_hertz"):
        note += f", PCIe counters {pcie:g}"
    if cost := sampling_cost_percent(trace):
        note += f"; sampling took {cost:.2f}% of one core"
        if with_ray := sampling_cost_percent(trace, "sampler_process_cpu_seconds"):
            note += f", {with_ray:.2f}% with its start and Ray's own part of its process"
    if recording.offsets.get(trace.host):
        note += f". Its clock was {recording.offsets[trace.host] * 1000:+.0f} ms off, known to "
        note += f"{recording.clock_error * 1000:.1f} ms, and is corrected"
    return f"{note}."


def _share_row(trace: HostTrace, card: str) -> dict[str, Any]:
    name = trace.card_facts(card).get("name", "")
    shares = card_shares(trace, card, *trace.span)
    return {"host": trace.host, "card": f"{card} {name}".strip()} | shares


def histogram(cards: list[tuple[HostTrace, str]], metric: str, title: str, scale: float) -> "go.Figure":
    """How often a card's sensor had which value."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (trace, card) in enumerate(cards):
        _add_histogram(figure, trace.get(metric, card)[1] / scale, f"{trace.host} card {card}", number)
    figure.update_layout(xaxis_title=title, yaxis_title="percent of the samples", barmode="group")
    return figure


def _traffic(cards: list[tuple[HostTrace, str]]) -> "go.Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (trace, card) in enumerate(cards):
        for metric, words in (("pcie.received", "to"), ("pcie.sent", "from")):
            values = trace.get(metric, card)[1]
            if len(values):
                side = 2 * number + (metric == "pcie.sent")
                _add_histogram(figure, values / MB, f"{words} {trace.host} card {card}", side)
    figure.update_layout(xaxis_title="MB a second", yaxis_title="percent of the samples", barmode="group")
    return figure


def _add_histogram(figure: "go.Figure", values: np.ndarray, name: str, number: int) -> None:
    counts, edges = np.histogram(values, bins=25)
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2, y=100 * counts / max(1, counts.sum()), name=name,
        marker_color=COLOURS[number % len(COLOURS)],
    )  # fmt: skip


def sampling_cost_percent(trace: HostTrace, fact: str = "sampler_cpu_seconds") -> float | None:
    """CPU seconds of the sampling threads per second of the recording, in percent of one core, or those that another
    fact has; None where the recording does not have it."""
    if not trace.facts.get("sampler_wall_seconds") or fact not in trace.facts:
        return None
    return float(100 * trace.facts[fact] / trace.facts["sampler_wall_seconds"])


def summarize(recording: Recording) -> Summary:
    """The recording in a few figures: the highest host's for a load, all hosts together for bytes and joules."""
    traces = recording.hosts.values()
    rows = [phase_table(trace, [Phase("", *trace.span)])[0] for trace in traces]

    def fold(key: str, how: Any) -> float | None:
        known = [value for row in rows if (value := row.get(key)) is not None]
        return round(float(how(known)), 3) if known else None

    costs = [cost for trace in traces if (cost := sampling_cost_percent(trace)) is not None]
    return {
        "hosts": len(rows),
        "samples": sum(len(trace.get("cpu.busy")[0]) for trace in traces),
        "recorded_seconds": fold("seconds", max),
        "cpu_mean_percent": fold("cpu_mean_percent", np.mean),
        "cpu_peak_percent": fold("cpu_peak_percent", max),
        "memory_peak_gib": fold("memory_peak_gib", max),
        "disk_read_gib": fold("disk_read_gib", sum),
        "disk_written_gib": fold("disk_written_gib", sum),
        "network_received_gib": fold("network_received_gib", sum),
        "network_sent_gib": fold("network_sent_gib", sum),
        "gpu_mean_percent": fold("gpu_mean_percent", np.mean),
        "gpu_joules": fold("gpu_joules", sum),
        "phases": len(recording.phases),
        "marks": len(recording.marks),
        "findings": [f"{one.host}: {one.says} ({one.evidence})" for one in findings(recording)],
        "sensors_missing": sum(len(trace.facts.get("missing", {})) for trace in traces),
        "sampler_core_percent": round(max(costs), 3) if costs else None,
    }
