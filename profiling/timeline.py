"""``workbench profile report``: a recording as one timeline per host, with a coloured band per phase.

workbench profile report recording=runs/profile-record/latest phases=phases.jsonl
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from profiling.trace import HostTrace, Phase, Series, read_phases, read_samples
from workbench.config import Config, InputPath
from workbench.report import Report
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import plotly.graph_objects as go

GIB = 2.0**30
MB = 1e6
MAX_POINTS = 1500
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6"]
INK = ["#1f4e9c", "#c2410c", "#2f7d32", "#7b3fa0"]


class ReportConfig(Config):
    """What to draw."""

    recording: InputPath = Field(description="run folder of a 'profile record', or of any command run with --profile")
    phases: InputPath | None = Field(None, description="JSON lines of name, start, end (epoch seconds): the bands")


def run(config: ReportConfig, run: Run) -> Summary:
    """Draw the recording; the summary holds its extent, loads and bytes."""
    samples = config.recording / "artifacts" / "samples"
    samples = samples if samples.is_dir() else config.recording
    trace = read_samples(samples)
    phases = read_phases(config.phases) if config.phases is not None else []
    run.input("recording", samples)
    if config.phases is not None:
        run.input("phases", config.phases)
    run.say(f"drawing {len(trace)} hosts, {len(phases)} phases")
    add_timelines(run.report, trace, phases)
    return summarize(trace)


def add_timelines(report: Report, traces: dict[str, HostTrace], phases: list[Phase]) -> None:
    """Add each host's timeline, its figures per phase, the sensors it lacks and what sampling cost."""
    for trace in traces.values():
        note = f"{trace.facts.get('cores', '?')} cores, {trace.facts.get('memory_bytes', 0) / GIB:.1f} GiB of memory"
        note += "".join(
            f", {card['name']} {card['memory_bytes'] / GIB:.0f} GiB" for card in trace.facts.get("gpus", [])
        )
        if cost := sampling_cost_percent(trace):
            note += f". Sampling at {trace.facts['hertz']:g} Hz took {cost:.2f}% of one core"
        for sensor, reason in trace.facts.get("missing", {}).items():
            note += f". Not measured: {sensor} ({reason})"
        report.figure(f"Timeline of {trace.host}", timeline_figure(trace, phases), note=f"{note}.")
        start, end = trace.span
        report.table(f"Phases on {trace.host}", phase_table(trace, phases or [Phase("whole recording", start, end)]))


def timeline_figure(trace: HostTrace, phases: list[Phase]) -> "go.Figure":
    """CPU, memory, disk and network of one host over time, its cards and PCIe links where it has some.

    The x axis is seconds since the first sample; each phase is a band over all rows, named in the row at the top.
    """
    from plotly.subplots import make_subplots

    rows = [(title, lines) for title, lines in _rows(trace) if lines]
    top = 1 if phases else 0
    figure = make_subplots(
        rows=len(rows) + top, cols=1, shared_xaxes=True, vertical_spacing=0.02,
        row_heights=[0.5] * top + [1.0] * len(rows),
    )  # fmt: skip
    zero = trace.span[0]
    for number, (title, lines) in enumerate(rows, 1 + top):
        for line, (name, series) in enumerate(lines):
            times, values = thin(series)
            figure.add_scatter(
                x=times - zero, y=values, name=name, mode="lines", row=number, col=1, legendgroup=title,
                legendgrouptitle_text=title, line={"width": 1.3, "color": INK[line % len(INK)]},
            )  # fmt: skip
        figure.update_yaxes(title_text=title, rangemode="tozero", row=number, col=1)
    for number, phase in enumerate(phases):
        colour = COLOURS[number % len(COLOURS)]
        figure.add_bar(
            x=[phase.end - phase.start], base=[phase.start - zero], y=[""], orientation="h", marker_color=colour,
            text=phase.name, textposition="inside", insidetextanchor="middle", name=phase.name, showlegend=False,
            hovertemplate=f"{phase.name}: {phase.end - phase.start:.1f} s<extra></extra>", row=1, col=1,
        )  # fmt: skip
        for row in range(2, len(rows) + 2):
            figure.add_vrect(
                x0=phase.start - zero, x1=phase.end - zero, fillcolor=colour, opacity=0.12, line_width=0,
                layer="below", row=row, col=1,
            )  # fmt: skip
    figure.update_layout(height=150 * len(rows) + 60 * top + 80, hovermode="x", barmode="overlay")
    figure.update_xaxes(title_text="seconds", row=len(rows) + top, col=1)
    return figure


def _rows(trace: HostTrace) -> list[tuple[str, list[tuple[str, Series]]]]:
    """(axis title, its lines) in the order they are drawn; a row without lines is a sensor that is missing."""

    def gauge(metric: str, device: str, scale: float = 1.0) -> Series:
        times, values = trace.series[metric, device]
        return times, values / scale

    def rates(metric: str, devices: list[str] | None, name: str) -> list[tuple[str, Series]]:
        series = trace.rate(metric, devices)
        return [] if series is None else [(name, (series[0], series[1] / MB))]

    def gauges(metric: str, label: str, scale: float = 1.0) -> list[tuple[str, Series]]:
        return [(label.format(device), gauge(metric, device, scale)) for device in trace.devices(metric)]

    outer, inner = interfaces(trace)
    return [
        ("CPU %", gauges("cpu.busy", "all cores")),
        ("memory GiB", gauges("memory.used", "in use", GIB) + gauges("swap.used", "swap", GIB)),
        ("disk MB/s", rates("disk.read_bytes", None, "read") + rates("disk.written_bytes", None, "written")),
        (
            "network MB/s",
            rates("network.received_bytes", outer, "received")
            + rates("network.sent_bytes", outer, "sent")
            + rates("network.sent_bytes", inner, "loopback"),
        ),
        ("GPU %", gauges("gpu.busy", "card {}")),
        ("GPU memory GiB", gauges("gpu.memory_used", "card {}", GIB)),
        ("GPU watts", gauges("gpu.power", "card {}")),
        ("PCIe MB/s", gauges("pcie.received", "to card {}", MB) + gauges("pcie.sent", "from card {}", MB)),
    ]


def interfaces(trace: HostTrace) -> tuple[list[str], list[str]]:
    """Interfaces that lead out of the host, and loopback. Bridges and container ends, which count traffic of the
    outer ones or of none a second time, are in neither."""
    virtual = ("veth", "docker", "br-", "virbr", "cni", "flannel", "ifb", "dummy", "utun", "awdl", "llw", "bridge")
    names = trace.devices("network.sent_bytes")
    return [n for n in names if not n.startswith(("lo", *virtual))], [n for n in names if n in ("lo", "lo0")]


def thin(series: Series) -> Series:
    """At most ``MAX_POINTS`` points: each the mean of consecutive ones."""
    times, values = series
    if len(times) <= MAX_POINTS:
        return series
    groups = np.array_split(np.arange(len(times)), MAX_POINTS)
    return np.array([times[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def phase_table(trace: HostTrace, phases: list[Phase]) -> list[dict[str, Any]]:
    """One row a phase: seconds, loads and bytes; None where nothing was sampled or the host lacks the sensor."""
    return [{"phase": phase.name, **phase_figures(trace, phase)} for phase in phases]


def phase_figures(trace: HostTrace, phase: Phase) -> dict[str, float | None]:
    """Seconds, mean and peak CPU percent, peak memory and bytes moved (GiB) of a phase; cards' where there are some."""
    outer, inner = interfaces(trace)

    def of(metric: str, fold: Any, scale: float = 1.0) -> float | None:
        values = [trace.values(metric, device, phase.start, phase.end) for device in trace.devices(metric)]
        joined = np.concatenate(values) if values else np.empty(0)
        return round(float(fold(joined)) / scale, 3) if len(joined) else None

    def moved(metric: str, devices: list[str] | None = None) -> float | None:
        total = trace.total(metric, phase.start, phase.end, devices)
        return None if total is None else round(total / GIB, 4)

    figures = {
        "seconds": round(phase.end - phase.start, 1),
        "cpu_mean_percent": of("cpu.busy", np.mean),
        "cpu_peak_percent": of("cpu.busy", np.max),
        "memory_peak_gib": of("memory.used", np.max, GIB),
        "disk_read_gib": moved("disk.read_bytes"),
        "disk_written_gib": moved("disk.written_bytes"),
        "network_received_gib": moved("network.received_bytes", outer),
        "network_sent_gib": moved("network.sent_bytes", outer),
        "loopback_gib": moved("network.sent_bytes", inner),
    }
    if trace.devices("gpu.busy"):
        figures["gpu_mean_percent"] = of("gpu.busy", np.mean)
        figures["gpu_memory_peak_gib"] = of("gpu.memory_used", np.max, GIB)
    return figures


def sampling_cost_percent(trace: HostTrace) -> float | None:
    """CPU seconds of the sampler per second of the recording, in percent of one core."""
    if not trace.facts.get("sampler_wall_seconds"):
        return None
    return float(100 * trace.facts["sampler_cpu_seconds"] / trace.facts["sampler_wall_seconds"])


def summarize(traces: dict[str, HostTrace]) -> Summary:
    """The recording in a few figures: the highest host's for a load, all hosts together for bytes."""
    rows = [phase_figures(trace, Phase("", *trace.span)) for trace in traces.values()]

    def fold(key: str, how: Any) -> float | None:
        known = [value for row in rows if (value := row[key]) is not None]
        return round(float(how(known)), 3) if known else None

    costs = [cost for trace in traces.values() if (cost := sampling_cost_percent(trace)) is not None]
    return {
        "hosts": len(traces),
        "samples": sum(len(trace.series["cpu.busy", ""][0]) for trace in traces.values()),
        "recorded_seconds": fold("seconds", max),
        "cpu_mean_percent": fold("cpu_mean_percent", np.mean),
        "cpu_peak_percent": fold("cpu_peak_percent", max),
        "memory_peak_gib": fold("memory_peak_gib", max),
        "disk_read_gib": fold("disk_read_gib", sum),
        "disk_written_gib": fold("disk_written_gib", sum),
        "network_received_gib": fold("network_received_gib", sum),
        "network_sent_gib": fold("network_sent_gib", sum),
        "sensors_missing": sum(len(trace.facts.get("missing", {})) for trace in traces.values()),
        "sampler_core_percent": round(max(costs), 3) if costs else None,
    }
