"""Compare the models behind an A/B route by what their users said and what their answers took.

    workbench serve ab-report folder=/srv/workbench/requests route=assistant

Requests are those of the gateway's record (``gateway.record.folder``), verdicts those of ``POST /v1/feedback``. The
intervals resample users, who stay with one model; a difference whose interval holds 0 is no finding.
"""

from collections import Counter
from typing import Any

from pydantic import Field

from serve.gateway.record import read_rows
from serve.intervals import Estimate, difference, estimate
from workbench.config import Config, InputPath
from workbench.errors import UserError
from workbench.runs import Run, Summary

FIGURES = {
    "score": "score (-1 to 1)",
    "failed": "share that failed",
    "first_token_ms": "time to first token (ms)",
    "total_ms": "whole answer (ms)",
    "completion_tokens": "tokens of an answer",
    "cost": "cost of a request",
}


class AbReportConfig(Config):
    """Which records, which route."""

    folder: InputPath = Field(description="Folder of the gateway's record")
    route: str = Field(default="", description="The route's name; default: the one that the record has")
    baseline: str = Field(default="", description="The model that others are compared with; default: the most asked")


def run(config: AbReportConfig, run: Run) -> Summary:
    """A table of each model's figures, one of the differences, and the forest of the differences' intervals."""
    run.input("record", config.folder)
    rows = [row for row in read_rows(config.folder, "requests") if row["variant_of"]]
    routes = Counter(row["variant_of"] for row in rows)
    route = config.route or (next(iter(routes)) if len(routes) == 1 else "")
    if route not in routes:
        raise UserError(f"route: give one of: {', '.join(routes) or f'there is none in {config.folder}'}")
    owners = {row["request_id"]: row["owner"] for row in rows}  # a verdict counts from who asked
    feedback = [row for row in read_rows(config.folder, "feedback") if owners.get(row["request_id"]) == row["owner"]]
    verdicts = {row["request_id"]: row["score"] for row in feedback}
    samples = by_model([row for row in rows if row["variant_of"] == route], verdicts)
    asked = {model: len(figures["failed"]) for model, figures in samples.items()}
    baseline = config.baseline or max(asked, key=lambda model: asked[model])
    if baseline not in samples:
        raise UserError(f"baseline: '{baseline}' answered nothing on this route; there are: {', '.join(samples)}")
    table = [
        {"model": model, "requests": asked[model], "users": len({user for _, user in figures["failed"]}),
         "verdicts": len(figures["score"]),
         **{text: str(_estimate(figures[name])) for name, text in FIGURES.items() if figures[name]}}
        for model, figures in samples.items()
    ]  # fmt: skip
    run.report.table("Models", table, note="mean (95% interval over users)")
    gaps = differences(samples, baseline)
    run.report.table(
        "Differences",
        [{"model": m, "figure": FIGURES[name], "minus baseline": str(gap), "finding": _finding(gap)}
         for m, name, gap in gaps],
        note=f"against {baseline}; the interval holds 0: no finding",
    )  # fmt: skip
    _figure(run, gaps, baseline)
    for model, name, gap in gaps:
        run.say(f"{model} against {baseline}, {FIGURES[name]}: {gap}: {_finding(gap)}")
    return {
        "route": route, "baseline": baseline, "requests": sum(asked.values()),
        "verdicts": sum(len(f["score"]) for f in samples.values()),
        **{f"{m}_{name}_difference": round(gap.mean, 6) for m, name, gap in gaps},
        **{f"{m}_{name}_finding": _finding(gap) for m, name, gap in gaps},
    }  # fmt: skip


Samples = dict[str, dict[str, list[tuple[float, str]]]]


def by_model(rows: list[dict[str, Any]], verdicts: dict[str, float]) -> Samples:
    """Model to figure to its values, each with its user. What a fallback answered says nothing of the model.

    A request that the model's queue or breaker refused failed; the client's own mistakes (4xx) did not.
    """
    samples: Samples = {}
    for row in rows:
        figures = samples.setdefault(row["asked"], {name: [] for name in FIGURES})
        user = row["user"] or row["key"]
        excused = row["error"] in ("", "client_gone") or 400 <= row["status"] < 500
        failed = bool(row["fallback_from"]) or not excused
        figures["failed"].append((float(failed), user))
        if failed or row["error"]:
            continue
        for name in ("first_token_ms", "total_ms", "completion_tokens", "cost"):
            if row[name] is not None:
                figures[name].append((float(row[name]), user))
        if row["request_id"] in verdicts:
            figures["score"].append((verdicts[row["request_id"]], user))
    return samples


def differences(samples: Samples, baseline: str) -> list[tuple[str, str, Estimate]]:
    """(model, figure, its difference to the baseline) for all other models and the figures that both have."""
    base = samples[baseline]
    return [
        (model, name, difference(*_columns(base[name]), *_columns(figures[name])))
        for model, figures in samples.items()
        if model != baseline
        for name in FIGURES
        if base[name] and figures[name]
    ]


def _columns(pairs: list[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [value for value, _ in pairs], [user for _, user in pairs]


def _estimate(pairs: list[tuple[float, str]]) -> Estimate:
    return estimate(*_columns(pairs))


def _finding(gap: Estimate) -> str:
    if gap.low != gap.low:
        return "too few users"
    return "higher" if gap.low > 0 else "lower" if gap.high < 0 else "none"


def _figure(run: Run, gaps: list[tuple[str, str, Estimate]], baseline: str) -> None:
    """Each difference in units of its interval's half width, so that all fit one axis."""
    import plotly.graph_objects as go

    shown = [(f"{m}: {FIGURES[name]}", gap) for m, name, gap in gaps if gap.high > gap.low]
    if not shown:
        return
    half = [(gap.high - gap.low) / 2 for _, gap in shown]
    figure = go.Figure()
    figure.add_scatter(
        x=[gap.mean / h for (_, gap), h in zip(shown, half, strict=True)], y=[name for name, _ in shown],
        mode="markers",
        error_x={
            "type": "data", "symmetric": False,
            "array": [(gap.high - gap.mean) / h for (_, gap), h in zip(shown, half, strict=True)],
            "arrayminus": [(gap.mean - gap.low) / h for (_, gap), h in zip(shown, half, strict=True)],
        },
        text=[str(gap) for _, gap in shown],
    )  # fmt: skip
    figure.add_vline(x=0)
    figure.update_layout(xaxis_title=f"difference to {baseline}, in half widths of its interval")
    run.report.figure("Differences and their intervals", figure)
