"""What a training run measured of itself, as a part of its report."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.runs import Run
from workbench.tracking import read_metrics

if TYPE_CHECKING:
    import plotly.graph_objects as go

PANELS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "model_flop_utilisation": "model FLOP utilisation",
    "peak_memory_gib": "peak memory, GiB",
}


def add_progress(run: Run) -> None:
    """Curves of the schedule, the gradient, speed and memory; the samples; the checkpoints that could not be made."""
    from workloads.training.checkpoint import read_failures
    from workloads.training.resume import CHECKPOINTS, SAMPLES
    from workloads.training.samples import read_samples

    run.report.figure(
        "While it ran", progress_curves(read_metrics(run.folder)),
        "Tokens are counted without padding, and their time without validation and samples. Peak memory is what torch "
        "allocated on a card, or the resident size of a worker on a CPU.",
    )  # fmt: skip
    if samples := read_samples(run.folder / SAMPLES):
        run.report.table("Samples", samples, "Greedy answers to held-out rows.")
    if failures := read_failures(run.folder / CHECKPOINTS):
        run.report.table("Checkpoints that could not be written", failures, "Training went on; those before were kept.")


def held_out_loss(run: Run, done: dict[str, Any]) -> tuple[int, float]:
    """Step and held-out loss of the weights that training ended with; says so where they should have been better."""
    (step, loss), (best_step, best) = done["result"], done["best"]
    if done["stopped_early"] and step != best_step:
        text = (
            f"The result has the weights of step {step} (held-out loss {loss:.3f}): those of step {best_step} "
            f"({best:.3f}), the lowest, are in no checkpoint."
        )
        run.say(text)
        run.report.text("Not the lowest loss", text)
    return step, loss


def storage_table(storage: list[dict[str, int]]) -> tuple[str, list[dict[str, Any]], str]:
    """Title, rows and note of what each worker stores, from each rank's ``sharded_bytes``."""
    rows = [
        {
            "rank": rank, "its share, bytes": held["local"], "of it 4-bit weights": held["local_packed"],
            "of it their scales": held["local_scales"], "whole model, bytes": held["whole"],
            "whole 4-bit weights": held["whole_packed"], "whole scales": held["whole_scales"],
        }
        for rank, held in enumerate(storage)
    ]  # fmt: skip
    note = "Parameters, measured after sharding: packed weights and both levels of their scales are shards, too."
    return "What each worker stores", rows, note


def usual_speed(folder: Path) -> float:
    """The median of the tokens per second in a run's metrics."""
    return statistics.median(row["tokens_per_second"] for row in read_metrics(folder) if "tokens_per_second" in row)


def progress_curves(rows: list[dict[str, Any]]) -> "go.Figure":
    """A panel for each measure that ``rows`` have over the steps; measures by rank share one."""
    from plotly.subplots import make_subplots

    keys = {key for row in rows for key in row}
    panels = {name: sorted(key for key in keys if key.partition("/")[0] == name) for name in PANELS}
    shown = {name: series for name, series in panels.items() if series}
    figure = make_subplots(
        rows=(len(shown) + 1) // 2, cols=2, subplot_titles=[PANELS[name] for name in shown], vertical_spacing=0.12
    )
    for place, series in enumerate(shown.values()):
        for key in series:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            figure.add_scatter(
                x=[step for step, _ in points], y=[value for _, value in points], mode="lines",
                name=key.partition("/")[2] or key, showlegend="/" in key, row=place // 2 + 1, col=place % 2 + 1,
            )  # fmt: skip
    figure.update_layout(height=260 * ((len(shown) + 1) // 2))
    return figure
