"""``workbench profile trace``: what the traced steps of a training run spent their time and memory on.

    workbench train sft configs/demo/sft.yaml trace="{first: 3, last: 5}"
    workbench profile trace run=runs/train-sft/latest

Any folder of torch.profiler's traces will do; ``workbench serve trace`` makes those of an engine. Each trace opens in
https://ui.perfetto.dev as it is.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import Field

from profiling.trace_events import RankTrace, read_traces
from profiling.trace_summary import MIB, by_kind, peak_memory, rank_rows, stragglers, why_idle
from workbench.config import Config, InputPath
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import plotly.graph_objects as go


class TraceConfig(Config):
    """What to read."""

    run: InputPath = Field(description="run folder of a training with 'trace', or a folder of torch.profiler's traces")


def run(config: TraceConfig, run: Run) -> Summary:
    """Summarise the traces of all ranks. Raises UserError where there are none."""
    traces = read_traces(config.run)
    run.input(
        "traces", config.run / "artifacts" / "trace" if (config.run / "artifacts" / "trace").is_dir() else config.run
    )
    return add_traces(run, traces)


def add_traces(run: Run, traces: list[RankTrace]) -> Summary:
    """Fill the report of ``run`` with the traces of all ranks, and return what they come to."""
    rows = rank_rows(traces)
    slow = stragglers(rows)
    breaks = Counter[str]()
    for trace in traces:
        breaks |= Counter(trace.facts.get("graph_breaks", {}))  # of the rank that had most: all compile the same
    run.report.table("Ranks, in milliseconds a step", rows, note="Exposed communication is what no compute hides.")
    run.report.text("Stragglers", "\n".join(slow) or "No rank computes longer than the others.")
    run.report.figure("Where a step goes", _bars(rows))
    for trace in traces:
        _add_rank(run, trace)
    if breaks:
        run.report.table("Graph breaks", [{"reason": reason, "count": count} for reason, count in breaks.items()])
    for line in slow:
        run.say(line)
    peaks = [peak_memory(trace, device)[0] for trace in traces for device in trace.memory]
    longest = max(rows, key=lambda row: row["step_ms"])
    kinds = by_kind(traces[0])
    return {
        "ranks": len(traces),
        "steps": rows[0]["steps"],
        "step_ms": round(longest["step_ms"], 2),
        "compute_ms": round(longest["compute_ms"], 2),
        "exposed_communication_ms": round(longest["exposed_communication_ms"], 2),
        "idle_percent": round(longest["idle_percent"], 1),
        "most_time": kinds[0]["kind"] if kinds else None,
        "peak_memory_mib": round(max(peaks), 1) if peaks else None,
        "graph_breaks": sum(breaks.values()),
        "stragglers": slow,
    }


def _add_rank(run: Run, trace: RankTrace) -> None:
    place = "its card" if trace.on_card else "the host: no card was traced"
    run.report.heading(f"Rank {trace.rank}", f"Work of {place}. The trace opens in https://ui.perfetto.dev.")
    run.report.table(f"Work by kind, rank {trace.rank}", by_kind(trace), note="Most: milliseconds a step.")
    if trace.on_card and (idle := why_idle(trace)):
        run.report.table(f"What the host did while the card idled, rank {trace.rank}", idle)
    for device in trace.memory:
        peak, rows = peak_memory(trace, device)
        note = f"{peak:,.1f} MiB at the peak."
        run.report.figure(f"Memory of the {device}, rank {trace.rank}", _memory_figure(trace, device), note=note)
        run.report.table(f"Largest allocations at the peak of the {device}, rank {trace.rank}", rows)


def _bars(rows: list[dict[str, Any]]) -> "go.Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    for key, name in (
        ("compute_ms", "compute"),
        ("exposed_communication_ms", "exposed communication"),
        ("idle_ms", "idle"),
    ):
        figure.add_bar(x=[f"rank {row['rank']}" for row in rows], y=[row[key] for row in rows], name=name)
    figure.update_layout(barmode="stack", yaxis_title="milliseconds a step")
    return figure


def _memory_figure(trace: RankTrace, device: str, points: int = 4000) -> "go.Figure":
    import plotly.graph_objects as go

    events = trace.memory[device]
    zero = trace.steps[0][0]
    every = len(events) // points + 1
    figure = go.Figure(
        go.Scatter(
            x=[(when - zero) / 1e3 for when, *_ in events[::every]],
            y=[total / MIB for *_, total in events[::every]],
            line_shape="hv",
            mode="lines",
        )
    )
    for number, (start, end) in enumerate(trace.steps, 1):
        figure.add_vrect(
            x0=(start - zero) / 1e3, x1=(end - zero) / 1e3, annotation_text=f"step {number}", opacity=0.1,
            fillcolor="#4c78a8" if number % 2 else "#f58518", line_width=0,
        )  # fmt: skip
    figure.update_layout(xaxis_title="milliseconds", yaxis_title="MiB allocated")
    return figure
