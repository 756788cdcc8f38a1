"""A host's recording drawn over time, with a coloured band per phase, and its figures per phase.

report.figure("Timeline of system-a", timeline_figure(recording.hosts["system-a"], recording.phases))
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from profiling.shares import interfaces
from profiling.trace import HostTrace, Mark, Phase, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go

GIB = 2.0**30
MB = 1e6
MAX_POINTS = 1500
MAX_BANDS = 60
MAX_MARKS = 400
MAX_PROCESSES = 6
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6"]
INK = ["#1f4e9c", "#c2410c", "#2f7d32", "#7b3fa0"]


def timeline_figure(
    trace: HostTrace,
    phases: list[Phase],
    marks: list[Mark] | None = None,
    zero: float | None = None,
    named: Callable[[str], str] = "process {}".format,
) -> "go.Figure":
    """CPU, memory, disk and network of one host over time, its cards and PCIe links where it has some.

    ``named`` says what the process of an id is.

    The x axis is seconds since ``zero``, by default the first sample. Each phase is a bar in the row at the top, one
    lane for each that runs beside others; those of the fullest lane are bands over all rows.
    """
    from plotly.subplots import make_subplots

    rows = [(title, lines) for title, lines in _rows(trace, named) if lines]
    lanes = _lanes(phases)
    banded, deepest = max(set(lanes), key=lanes.count, default=0), max(lanes, default=0)
    top = 1 if phases or marks else 0
    figure = make_subplots(
        rows=len(rows) + top, cols=1, shared_xaxes=True, vertical_spacing=0.02,
        row_heights=[0.3 + 0.2 * deepest] * top + [1.0] * len(rows),
    )  # fmt: skip
    zero = trace.span[0] if zero is None else zero
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
            x=[phase.seconds], base=[phase.start - zero], y=[lanes[number]], orientation="h", marker_color=colour,
            text=phase.name, textposition="inside", insidetextanchor="middle", name=phase.name, showlegend=False,
            hovertemplate=f"{phase.name}: {phase.seconds:.1f} s<extra></extra>", row=1, col=1,
        )  # fmt: skip
        if lanes[number] != banded or number >= MAX_BANDS:
            continue
        for row in range(2, len(rows) + 2):
            figure.add_vrect(
                x0=phase.start - zero, x1=phase.end - zero, fillcolor=colour, opacity=0.12, line_width=0,
                layer="below", row=row, col=1,
            )  # fmt: skip
    for name in sorted({mark.name for mark in marks or []}):
        all_of_it = [(mark.time - zero, mark.value) for mark in marks or [] if mark.name == name]
        shown = all_of_it[:: len(all_of_it) // MAX_MARKS + 1]
        figure.add_scatter(
            x=[time for time, _ in shown], y=[-1] * len(shown), mode="markers", name=name, showlegend=False,
            marker={"symbol": "line-ns-open", "size": 9, "color": INK[0]}, row=1, col=1,
            customdata=[str(value) for _, value in shown], hovertemplate=f"{name} %{{customdata}}<extra></extra>",
        )  # fmt: skip
    if top:
        figure.update_yaxes(showticklabels=False, autorange="reversed", row=1, col=1)
    height = 150 * len(rows) + (60 + 25 * deepest) * top + 80
    figure.update_layout(height=height, hovermode="x", barmode="overlay")
    figure.update_xaxes(title_text="seconds", row=len(rows) + top, col=1)
    return figure


def _lanes(phases: list[Phase]) -> list[int]:
    """The lane of each phase: the first that is free over its whole time."""
    lanes: list[int] = []
    free: list[float] = []
    for phase in phases:  # in order of start, the longest first
        lane = next((lane for lane, end in enumerate(free) if end <= phase.start), len(free))
        free[lane : lane + 1] = [phase.end]
        lanes.append(lane)
    return lanes


def _rows(trace: HostTrace, named: Callable[[str], str]) -> list[tuple[str, list[tuple[str, Series]]]]:
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
    busiest = sorted(trace.devices("process.cpu"), key=lambda process: -trace.get("process.cpu", process)[1].sum())
    return [
        ("CPU %", gauges("cpu.busy", "all cores") + _busiest_core(trace) + gauges("cpu.io_wait", "waits for disk")),
        (
            "memory GiB",
            gauges("memory.used", "in use", GIB)
            + gauges("swap.used", "swap", GIB)
            + gauges("object_store.used", "object store", GIB),
        ),
        ("disk MB/s", rates("disk.read_bytes", None, "read") + rates("disk.written_bytes", None, "written")),
        (
            "network MB/s",
            rates("network.received_bytes", outer, "received")
            + rates("network.sent_bytes", outer, "sent")
            + rates("network.sent_bytes", inner, "loopback"),
        ),
        ("processes, % of a core", [(named(one), gauge("process.cpu", one)) for one in busiest[:MAX_PROCESSES]]),
        ("GPU %", gauges("gpu.busy", "card {}")),
        (
            "GPU memory GiB",
            gauges("gpu.memory_used", "card {}", GIB)
            + [
                (
                    f"card {device.partition('/')[0]}: {named(device.partition('/')[2])}",
                    gauge("gpu.process_memory", device, GIB),
                )
                for device in trace.devices("gpu.process_memory")
            ],
        ),
        ("GPU watts", gauges("gpu.power", "card {}")),
        ("GPU degrees C", gauges("gpu.temperature", "card {}")),
        ("GPU MHz", gauges("gpu.sm_clock", "card {}")),
        (
            "video %",
            [
                line
                for line in gauges("gpu.encoder", "encoder of card {}") + gauges("gpu.decoder", "decoder of card {}")
                if line[1][1].any()
            ],
        ),
        ("PCIe MB/s", gauges("pcie.received", "to card {}", MB) + gauges("pcie.sent", "from card {}", MB)),
        (
            "NVLink MB/s",
            [
                line
                for card in trace.devices("nvlink.received_bytes")
                for line in rates("nvlink.received_bytes", [card], f"to card {card}")
                + rates("nvlink.sent_bytes", [card], f"from card {card}")
            ],
        ),
    ]


def _busiest_core(trace: HostTrace) -> list[tuple[str, Series]]:
    """Where one thread is the limit, one core is full and the mean of many shows nothing."""
    cores = [trace.get("cpu.core_busy", core) for core in trace.devices("cpu.core_busy")]
    if len(cores) < 2 or len({len(times) for times, _ in cores}) > 1:
        return []
    return [("busiest core", (cores[0][0], np.max([values for _, values in cores], axis=0)))]


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
        "seconds": round(phase.seconds, 1),
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
        joules = [trace.joules(phase.start, phase.end, card) for card in trace.cards]
        figures["gpu_joules"] = round(sum(known), 1) if (known := [j for j in joules if j is not None]) else None
    return figures
