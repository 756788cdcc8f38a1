"""Plotly figures of a sweep's report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune.space import shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tune.study import SweepStudy, TrialRecord

FAINT = "#b5bcc7"
"""Of trials that did not come to their end."""

STRONG = "#2f5fd0"

STATES = {
    "finished": STRONG, "stopped early": FAINT, "stopped": "#8a94a6", "diverged": "#e0a030", "does not fit": "#e0a030",
    "failed": "#c0392b", "running": "#2e9e6b",
}  # fmt: skip

ABSENT = "(not set)"


def curves(trials: "Sequence[TrialRecord]", metric: str) -> "go.Figure":
    """The metric over steps, a line a trial; grey ones did not finish."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": metric, "height": 400})
    for trial in trials:
        figure.add_scatter(
            x=[step for step, _ in trial.curve],
            y=[value for _, value in trial.curve],
            name=f"{trial.number}: {shown(trial.point)}",
            mode="lines+markers",
            line_color=None if trial.state == "finished" else FAINT,
        )
    return figure


def parallel_coordinates(trials: "Sequence[TrialRecord]", metric: str, minimises: bool = True) -> "go.Figure":
    """An axis for each key of the space and one for the metric, coloured by it, the best lightest; trials without one
    are left out."""
    import plotly.graph_objects as go

    rows = [trial for trial in trials if trial.value is not None]
    values = [trial.value for trial in rows]
    keys = dict.fromkeys(key for trial in rows for key in trial.point)
    axes = [_axis(key, [trial.point.get(key, ABSENT) for trial in rows]) for key in keys]
    axes += [{"label": "steps", "values": [trial.steps for trial in rows]}, {"label": metric, "values": values}]
    line = {"color": values, "colorscale": "Viridis", "reversescale": minimises, "showscale": True}
    return go.Figure(go.Parcoords(line=line, dimensions=axes), layout={"height": 400})


def importances(study: "SweepStudy", finished: "Sequence[TrialRecord]") -> "go.Figure | None":
    """How much each key explains, as bars; None where there are too few finished trials, or one key alone."""
    import plotly.graph_objects as go

    shares = study.importances() if len(finished) >= 4 else {}
    if len(shares) < 2:
        return None
    keys = sorted(shares, key=lambda key: shares[key])
    bars = go.Bar(x=[shares[key] for key in keys], y=keys, orientation="h", marker_color=STRONG)
    return go.Figure(bars, layout={"xaxis_title": "share explained", "height": 120 + 40 * len(keys)})


def contour(study: "SweepStudy", finished: "Sequence[TrialRecord]", metric: str) -> "go.Figure | None":
    """The metric over the two keys that explain most, between the trials (linear) and at them; None where there are too
    few finished trials, or keys."""
    shares = study.importances() if len(finished) >= 4 else {}
    first, second = (*sorted(shares, key=lambda key: -shares[key]), "", "")[:2]
    return study.contour(first, second, metric) if second else None


def pareto(study: "SweepStudy", finished: "Sequence[TrialRecord]", metric: str) -> "go.Figure":
    """The first metric, called ``metric``, against what a trial cost, card-seconds where it had a card."""
    cards = any(trial.gpu_seconds for trial in finished)
    costs = {trial.number: trial.gpu_seconds if cards else trial.seconds for trial in finished}
    return _against(study, finished, costs, "GPU-seconds" if cards else "seconds", metric)


def front(study: "SweepStudy", finished: "Sequence[TrialRecord]", other: str, metric: str) -> "go.Figure":
    """The first metric, called ``metric``, against ``other``, another of the study's."""
    values = {trial.number: trial.values[other] for trial in finished}
    return _against(study, finished, values, other, metric, least=study.metrics[other] == "min")


def _against(
    study: "SweepStudy", finished: "Sequence[TrialRecord]", across: dict[int, float], title: str, metric: str,
    least: bool = True,
) -> "go.Figure":  # fmt: skip
    """The first metric over ``across`` (``least`` of it is best), and the front of those that none beats in both."""
    import plotly.graph_objects as go

    first, sign = next(iter(study.metrics)), 1 if least else -1
    best = 1 if study.metrics[first] == "min" else -1
    points = sorted(
        ((across[trial.number], trial.values[first], trial.number) for trial in finished),
        key=lambda point: (sign * point[0], best * point[1]),
    )
    line: list[tuple[float, float]] = []
    for place, value, _ in points:
        if not line or study.better(value, line[-1][1]):
            line.append((place, value))
    figure = go.Figure(layout={"xaxis_title": title, "yaxis_title": metric, "height": 400})
    figure.add_scatter(
        x=[place for place, _, _ in points], y=[value for _, value, _ in points], mode="markers+text", name="trial",
        text=[str(number) for _, _, number in points], textposition="top center", marker_color=FAINT,
    )  # fmt: skip
    figure.add_scatter(
        x=[place for place, _ in line], y=[value for _, value in line], mode="lines+markers", name="front",
        line_shape="hv", line_color=STRONG,
    )  # fmt: skip
    return figure


def timeline(trials: "Sequence[TrialRecord]") -> "go.Figure":
    """Every attempt of every trial from start to end, a row a host and card, coloured by how the trial ended."""
    import plotly.graph_objects as go

    bars = [
        (trial, attempt, f"{attempt.get('host', '?')} {attempt.get('card', '') or 'CPU'}")
        for trial in trials
        for attempt in trial.attempts
        if "ended" in attempt
    ]
    start = min((attempt["began"] for _, attempt, _ in bars), default=0.0)
    figure = go.Figure(layout={"xaxis_title": "minutes", "barmode": "overlay", "height": 400})
    for state, colour in STATES.items():
        of_it = [bar for bar in bars if bar[0].state == state]
        if of_it:
            figure.add_bar(
                name=state, orientation="h", marker_color=colour, marker_line_color="white", marker_line_width=1,
                base=[(attempt["began"] - start) / 60 for _, attempt, _ in of_it],
                x=[(attempt["ended"] - attempt["began"]) / 60 for _, attempt, _ in of_it],
                y=[f"{place}, {trial.number}" for trial, _, place in of_it],
                hovertext=[f"trial {trial.number}: {shown(trial.point)}" for trial, _, _ in of_it],
            )  # fmt: skip
    return figure


def _axis(key: str, values: list[Any]) -> dict[str, Any]:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        names = sorted({str(value) for value in values})
        places = [names.index(str(value)) for value in values]
        return {"label": key, "values": places, "tickvals": list(range(len(names))), "ticktext": names}
    if values and min(values) > 0 and max(values) / min(values) >= 5:
        ticks = sorted(set(values))
        text = [f"{value:.3g}" for value in ticks]
        logs = [math.log10(value) for value in values]
        return {"label": key, "values": logs, "tickvals": [math.log10(tick) for tick in ticks], "ticktext": text}
    return {"label": key, "values": values}
