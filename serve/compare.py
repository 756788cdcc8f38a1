"""Set two load tests beside each other: throughput and latency of the second over the first, with intervals.

    workbench serve compare runs/serve-loadtest/A runs/serve-loadtest/B

Levels that both have are compared, model by model where both have one of that name, else each's only model.
"""

from typing import Any

from pydantic import Field, field_validator

from serve.load_figures import ratio_interval, throughput_ratio
from serve.load_report import read_requests
from serve.traffic import Outcome
from workbench.config import Config
from workbench.errors import UserError
from workbench.runs import Run, Summary, resolve_run

Levels = dict[tuple[str, str], tuple[list[Outcome], float]]


class CompareConfig(Config):
    """Which runs."""

    runs: list[str] = Field(description="Two run folders of 'serve loadtest'")

    @field_validator("runs", mode="before")
    @classmethod
    def _two(cls, runs: Any) -> Any:
        return runs.split() if isinstance(runs, str) else runs


def run(config: CompareConfig, run: Run) -> Summary:
    """Compare the second run with the first. Raises UserError where they have nothing in common."""
    if len(config.runs) != 2:
        raise UserError(f"two runs are compared, not {len(config.runs)}")
    folders = [resolve_run(name) for name in config.runs]
    first, second = (read_requests(folder) for folder in folders)
    for name, folder in zip(("first", "second"), folders, strict=True):
        run.input(name, folder / "artifacts" / "requests.parquet")
    rows = compare(first, second)
    if not rows:
        raise UserError(f"the runs share no level: {_levels(first)}; and {_levels(second)}")
    run.report.table("Second over first", rows, note="Ratios with 95% intervals by resampling requests. An interval "
                     "that holds 1 shows no difference. Requests of one run are not independent, so the intervals are "
                     "too narrow rather than too wide.")  # fmt: skip
    for row in rows:
        run.say(
            f"{row['model']} {row['level']}: throughput {row['throughput']}, first token p50 {row['ttft_p50']}, "
            f"latency p95 {row['latency_p95']}"
        )
    return {"levels": len(rows), "comparison": rows}


def compare(first: Levels, second: Levels) -> list[dict[str, Any]]:
    """A row for each level that both have."""
    import numpy as np

    names = [sorted({model for model, _ in side}) for side in (first, second)]
    only = {names[0][0]: names[1][0]} if len(names[0]) == len(names[1]) == 1 else {}
    rows = []
    for (model, level), (before, wall) in first.items():
        other = only.get(model, model)
        if (other, level) not in second:
            continue
        after, other_wall = second[other, level]
        a, b = ([o for o in outcomes if not o.error] for outcomes in (before, after))
        if min(len(a), len(b)) < 2:
            continue
        rows.append({
            "model": model if other == model else f"{model} and {other}",
            "level": level,
            "requests": f"{len(a)} and {len(b)}",
            "throughput": _text(*throughput_ratio(a, wall, b, other_wall)),
            "ttft_p50": _text(*ratio_interval(a, b, lambda v: np.median(v[..., 0], axis=1))),
            "ttft_p95": _text(*ratio_interval(a, b, lambda v: np.percentile(v[..., 0], 95, axis=1))),
            "latency_p50": _text(*ratio_interval(a, b, lambda v: np.median(v[..., 1], axis=1))),
            "latency_p95": _text(*ratio_interval(a, b, lambda v: np.percentile(v[..., 1], 95, axis=1))),
        })  # fmt: skip
    return rows


def _text(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def _levels(side: Levels) -> str:
    return ", ".join(f"{model} {level}" for model, level in side)
