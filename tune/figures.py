"""Plotly figures of a sweep's report."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOUR = {"finished": "#2f5fd0", "stopped early": "#b5bcc7", "failed": "#c0392b"}


def curves(trials: list[dict[str, Any]]) -> "go.Figure":
    """Held-out loss over steps, a line a trial; grey ones were stopped early."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": "held-out loss", "height": 400})
    for trial in trials:
        point = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial["point"].items())
        figure.add_scatter(
            x=[step for step, _ in trial["curve"]],
            y=[loss for _, loss in trial["curve"]],
            name=f"{trial['trial']}: {point}",
            mode="lines+markers",
            line_color=None if trial["state"] == "finished" else COLOUR[trial["state"]],
        )
    return figure


def parallel_coordinates(trials: list[dict[str, Any]]) -> "go.Figure":
    """An axis for each key of the space and one for the loss, coloured by the loss; trials without one are left out."""
    import plotly.graph_objects as go

    rows = [trial for trial in trials if trial["validation_loss"] is not None]
    losses = [trial["validation_loss"] for trial in rows]
    axes = [_axis(key, [trial["point"][key] for trial in rows]) for key in (rows[0]["point"] if rows else [])]
    axes += [{"label": "steps", "values": [t["steps"] for t in rows]}, {"label": "held-out loss", "values": losses}]
    line = {"color": losses, "colorscale": "Viridis", "reversescale": True, "showscale": True}
    return go.Figure(go.Parcoords(line=line, dimensions=axes), layout={"height": 400})


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
