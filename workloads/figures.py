"""Plotly figures of training reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workloads.scaling_law import Law

Curve = list[tuple[int, float]]


def loss_curves(train: Curve, validation: Curve, unit: str = "nats per token") -> "go.Figure":
    """Training and held-out loss over steps."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": f"loss, {unit}", "height": 380})
    for name, curve, mode in (("training", train, "lines"), ("held out", validation, "lines+markers")):
        if curve:
            figure.add_scatter(x=[s for s, _ in curve], y=[loss for _, loss in curve], name=name, mode=mode)
    return figure


def preference_curves(rows: list[dict[str, Any]]) -> "go.Figure":
    """Rewards, margin, accuracy and log-probabilities over steps, of training (lines) and held-out pairs (dashed)."""
    from plotly.subplots import make_subplots

    panels = ("reward", "margin", "accuracy", "log_probability")
    figure = make_subplots(rows=2, cols=2, subplot_titles=[panel.replace("_", "-") for panel in panels])
    colours = {"": "#2f5fd0", "chosen": "#2f5fd0", "rejected": "#e0a030"}
    keys = sorted({key for row in rows for key in row if key.removeprefix("validation_").partition("/")[0] in panels})
    for key in keys:
        panel, _, side = key.removeprefix("validation_").partition("/")
        held_out, place = key.startswith("validation_"), panels.index(panel)
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        figure.add_scatter(
            x=[step for step, _ in points], y=[value for _, value in points], line={"color": colours[side]},
            line_dash="dash" if held_out else "solid", mode="lines+markers" if held_out else "lines",
            name=f"{side or panel}, held out" if held_out else side or panel, showlegend=panel != "log_probability",
            row=place // 2 + 1, col=place % 2 + 1,
        )  # fmt: skip
    figure.update_layout(height=560)
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


def scaling_curves(rows: list[dict[str, Any]], law: "Law", laws: "list[Law]", reach: float) -> "go.Figure":
    """Loss against parameters on log axes, a colour for each number of tokens: runs, law, and the law ``reach`` times
    beyond the largest run, dashed, in the 95% interval of ``laws``."""
    import numpy as np
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    from workloads.scaling_law import interval

    figure = go.Figure(layout={"xaxis_title": "parameters", "yaxis_title": "held-out loss, nats per token"})
    figure.update_layout(height=480, xaxis_type="log", yaxis_type="log")
    smallest, largest = (edge(row["parameters"] for row in rows) for edge in (min, max))
    within, beyond = np.geomspace(smallest, largest, 50), np.geomspace(largest, reach * largest, 30)
    whole = np.concatenate((within, beyond[1:]))
    for place, tokens in enumerate(sorted({row["tokens"] for row in rows})):
        colour = qualitative.D3[place % len(qualitative.D3)]
        name = f"{tokens:,} tokens"
        line = {"color": colour}
        low, high = interval([other.loss(whole, tokens) for other in laws])
        figure.add_scatter(x=whole, y=low, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            x=whole, y=high, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=f"rgba{_rgba(colour, 0.15)}",
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(x=within, y=law.loss(within, tokens), mode="lines", line=line, name="law", showlegend=False)
        figure.add_scatter(
            x=beyond, y=law.loss(beyond, tokens), mode="lines", line={**line, "dash": "dash"}, name="extrapolation",
            showlegend=False,
        )  # fmt: skip
        mine = [row for row in rows if row["tokens"] == tokens]
        figure.add_scatter(
            x=[row["parameters"] for row in mine], y=[row["loss"] for row in mine], mode="markers", name=name,
            marker={"color": colour, "size": 9},
        )  # fmt: skip
    return figure


def _rgba(colour: str, opacity: float) -> tuple[float, ...]:
    return (*(int(colour[place : place + 2], 16) for place in (1, 3, 5)), opacity)
