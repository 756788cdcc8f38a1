"""Figures of a level of load: throughput, percentiles, goodput under an objective, the knee, and intervals.

Times are milliseconds, percentiles linearly interpolated. ITL is every gap between two chunks of an answer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from serve.traffic import Driven, Outcome
from workbench.config import Config

QUANTILES = (50, 90, 95, 99)
RESAMPLES = 1000
BLOCKS = 20
"""Equal parts of a level's time, whose tokens are resampled."""


class Objective(Config):
    """What a good answer keeps to; goodput counts those alone."""

    ttft_ms: float | None = Field(default=None, gt=0, description="Time to first token at most")
    inter_token_ms: float | None = Field(default=None, gt=0, description="Mean time of a token after the first at most")
    latency_ms: float | None = Field(default=None, gt=0, description="Time of the whole answer at most")

    def met(self, outcome: Outcome) -> bool:
        """Whether an answer keeps to all of it; one of a single token has no time between tokens."""
        times = ((self.ttft_ms, outcome.first_token), (self.inter_token_ms, outcome.inter_token),
                 (self.latency_ms, outcome.latency))  # fmt: skip
        return not outcome.error and all(most is None or taken is None or taken * 1000 <= most for most, taken in times)

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_ms')} <= {most:g} ms" for name, most in self if most is not None)


def summarise(driven: Driven, objective: Objective) -> dict[str, Any]:
    """A level's figures; percentiles are of the requests that succeeded."""
    outcomes, wall = driven.outcomes, driven.wall
    good = [outcome for outcome in outcomes if not outcome.error]
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error)
    spread = max((o.started for o in outcomes), default=0.0) - min((o.started for o in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "error_kinds": ", ".join(f"{kind}: {number}" for kind, number in kinds.most_common()),
        "sent_per_s": (len(outcomes) - 1) / spread if spread > 0 else float(len(outcomes)),
        "requests_per_s": len(good) / wall,
        "goodput_per_s": sum(map(objective.met, outcomes)) / wall,
        "output_tokens_per_s": sum(outcome.output_tokens for outcome in good) / wall,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        **_percentiles("ttft", [outcome.first_token for outcome in good]),
        **_percentiles("itl", [gap for outcome in good for gap in outcome.gaps]),
        **_percentiles("latency", [outcome.latency for outcome in good]),
        "generator_cpu": driven.watch.cpu,
        "generator_lag_p99_ms": driven.watch.lag * 1000,
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """``NAME_pQ_ms`` for each quantile; None without a value."""
    import numpy as np

    if not seconds:
        return {f"{name}_p{q}_ms": None for q in QUANTILES}
    values = np.percentile(np.asarray(seconds) * 1000, QUANTILES)
    return {f"{name}_p{q}_ms": float(value) for q, value in zip(QUANTILES, values, strict=True)}


def knee(rows: Sequence[dict[str, Any]]) -> int | None:
    """The index of the level where throughput divided by latency is highest (Kleinrock's power, "Power and
    Deterministic Rules of Thumb for Probabilistic Problems in Computer Communications", 1979): more load than that
    costs more latency than it brings throughput. None with fewer than three levels that have an answer."""
    power = {
        index: row["output_tokens_per_s"] / row["latency_p50_ms"]
        for index, row in enumerate(rows)
        if row["latency_p50_ms"]
    }
    return max(power, key=lambda index: power[index]) if len(power) > 2 else None


def ratio_interval(
    first: Sequence[Outcome], second: Sequence[Outcome], figure: Callable[[Any], Any], seed: int = 0
) -> tuple[float, float, float]:
    """``figure`` of the second over that of the first, and its 95% interval by resampling the requests of each side
    (percentile bootstrap, 1,000 times). ``figure`` takes an array of shape [resamples, requests, 3] of first token,
    latency and output tokens, and reduces its requests."""
    import numpy as np

    random = np.random.default_rng(seed)

    def rows(outcomes: Sequence[Outcome]) -> Any:
        return np.asarray([(o.first_token, o.latency, o.output_tokens) for o in outcomes], dtype=float)

    def draws(values: Any) -> Any:
        return figure(values[random.integers(0, len(values), (RESAMPLES, len(values)))])

    a, b = rows(first), rows(second)
    ratios = draws(b) / draws(a)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float((figure(b[None]) / figure(a[None]))[0]), float(low), float(high)


def throughput_ratio(
    first: Sequence[Outcome], first_wall: float, second: Sequence[Outcome], second_wall: float, seed: int = 0
) -> tuple[float, float, float]:
    """Output tokens a second of the second over the first, and its 95% interval by resampling ``BLOCKS`` parts of each
    level's time."""
    import numpy as np

    random = np.random.default_rng(seed)
    a, b = _tokens_by_block(first, first_wall), _tokens_by_block(second, second_wall)
    draws = [blocks[random.integers(0, BLOCKS, (RESAMPLES, BLOCKS))].mean(1) for blocks in (a, b)]
    low, high = np.percentile(draws[1] / np.maximum(draws[0], 1e-9), [2.5, 97.5])
    return float(b.mean() / a.mean()), float(low), float(high)


def _tokens_by_block(outcomes: Sequence[Outcome], wall: float) -> Any:
    """Tokens a second in each part of the level; a chunk stands for an equal share of its answer's tokens."""
    import numpy as np

    begun = min(outcome.started for outcome in outcomes)
    blocks = np.zeros(BLOCKS)
    for outcome in outcomes:
        times = outcome.started - begun + outcome.first_token + np.concatenate([[0.0], np.cumsum(outcome.gaps)])
        index = np.minimum((times / wall * BLOCKS).astype(int), BLOCKS - 1)
        np.add.at(blocks, index, outcome.output_tokens / len(times))
    return blocks / (wall / BLOCKS)
