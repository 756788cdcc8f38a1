"""Plotly figures of training reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

Curve = list[tuple[int, float]]


def loss_curves(train: Curve, validation: Curve) -> "go.Figure":
    """Training and held-out loss over steps."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": "loss, nats per token", "height": 380})
    for name, curve, mode in (("training", train, "lines"), ("held out", validation, "lines+markers")):
        if curve:
            figure.add_scatter(x=[s for s, _ in curve], y=[loss for _, loss in curve], name=name, mode=mode)
    return figure


def accuracy_bars(tasks: list[dict[str, Any]]) -> "go.Figure":
    """Bars of accuracy by task with 95% intervals, a colour for each of base, tuned and majority."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"yaxis_title": "share right", "barmode": "group", "height": 420})
    for side, colour in (("base", "#b5bcc7"), ("majority", "#e0a030"), ("tuned", "#2f5fd0")):
        shares = [entry[side] for entry in tasks]
        bounds = [entry[f"{side} 95%"] for entry in tasks]
        reach = {
            "type": "data",
            "symmetric": False,
            "array": [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
            "thickness": 1,
        }
        figure.add_bar(x=[e["task"] for e in tasks], y=shares, name=side, marker_color=colour, error_y=reach)
    return figure
