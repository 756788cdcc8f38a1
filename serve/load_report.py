"""The page of a load test, and the file of all its requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.load_figures import QUANTILES, Objective, knee
from serve.traffic import Driven, Outcome
from workbench.errors import UserError
from workbench.runs import Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

DASHES = ("solid", "dash", "dot", "dashdot")


def write_requests(path: Path, rows: Sequence[dict[str, Any]], driven: Sequence[Driven]) -> None:
    """Every request of every level as a row of Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = [
        {"model": row["model"], "level": row["level"], "load": row["load"], "wall": level.wall, **_columns(outcome)}
        for row, level in zip(rows, driven, strict=True)
        for outcome in level.outcomes
    ]
    pq.write_table(pa.Table.from_pylist(told), path)


def _columns(outcome: Outcome) -> dict[str, Any]:
    return {
        "started": outcome.started, "latency": outcome.latency, "first_token": outcome.first_token,
        "output_tokens": outcome.output_tokens, "prompt_tokens": outcome.prompt_tokens, "error": outcome.error,
        "gaps": list(outcome.gaps), "late": outcome.late,
    }  # fmt: skip


def read_requests(folder: Path) -> dict[tuple[str, str], tuple[list[Outcome], float]]:
    """Outcomes and wall time by model and level of a load test's run folder. Raises UserError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "artifacts" / "requests.parquet"
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException):
        raise UserError(f"{folder} is no run of 'serve loadtest': {path} cannot be read") from None
    found: dict[tuple[str, str], tuple[list[Outcome], float]] = {}
    for row in rows:
        outcomes, _ = found.setdefault((row["model"], row["level"]), ([], row["wall"]))
        outcomes.append(
            Outcome(row["started"], row["latency"], row["first_token"], row["output_tokens"], row["prompt_tokens"],
                    row["error"], tuple(row["gaps"]), row["late"])
        )  # fmt: skip
    return found


def report(
    run: Run, rows: list[dict[str, Any]], objective: Objective, doubts: list[str], about: str,
    offset: tuple[float, float] | None,
) -> None:  # fmt: skip
    """Tables and figures of the levels, and what makes them doubtful."""
    import plotly.graph_objects as go

    told = str(objective)
    run.report.table("Load", rows, note=about + (f" Goodput: {told}." if told else ""))
    clock = "not told by the server" if offset is None else f"{offset[0]:+.2f} s, within {offset[1]:.2f} s"
    checks = "\n".join(doubts) or "The generator kept up at every level, and the clocks agree."
    run.report.text("Checks", f"{checks}\nThe server's clock against this one: {clock}.")
    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    run.report.figure("Latency against throughput", latency_against_throughput(of), note="The knee is the level with "
                      "the most throughput for its latency (Kleinrock's power).")  # fmt: skip
    for key, title in (("ttft", "Time to first token"), ("itl", "Time between tokens"), ("latency", "Latency")):
        figure = go.Figure()
        for model, dash in zip(models, DASHES * len(models), strict=False):
            for q in QUANTILES:
                figure.add_scatter(
                    x=[row["load"] for row in of[model]], y=[row[f"{key}_p{q}_ms"] for row in of[model]],
                    name=f"{model} p{q}", mode="lines+markers", line={"dash": dash},
                )  # fmt: skip
        figure.update_layout(xaxis_title="requests in flight, or a second", yaxis_title="ms", xaxis_type="log")
        run.report.figure(title, figure)


def latency_against_throughput(of: dict[str, list[dict[str, Any]]]) -> "go.Figure":
    """Median and p95 latency over output tokens a second, a point a level, the knee of each model marked."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for model, rows in of.items():
        x = [row["output_tokens_per_s"] for row in rows]
        for q, dash in ((50, "solid"), (95, "dash")):
            figure.add_scatter(
                x=x, y=[row[f"latency_p{q}_ms"] for row in rows], text=[row["level"] for row in rows],
                textposition="top center", mode="lines+markers+text", name=f"{model} p{q}", line={"dash": dash},
            )  # fmt: skip
        if (index := knee(rows)) is not None:
            figure.add_scatter(
                x=[x[index]], y=[rows[index]["latency_p50_ms"]], mode="markers", name=f"{model} knee",
                marker={"size": 16, "symbol": "circle-open", "line": {"width": 3}},
            )  # fmt: skip
    figure.update_layout(xaxis_title="output tokens a second", yaxis_title="latency, ms", yaxis_type="log")
    return figure
