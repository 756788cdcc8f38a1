"""Plotly figures of training reports."""

from typing import TYPE_CHECKING

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
