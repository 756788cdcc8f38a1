"""Means with intervals where requests come in groups: one user's are alike, so users are resampled, not requests.

The cluster bootstrap (Field & Welsh, 2007, "Bootstrapping clustered data"): draw as many users as there are, with
replacement, take the mean over all their requests, repeat, and read the interval from the quantiles.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

REPEATS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval, over ``n`` values of ``clusters`` groups; the interval is NaN for one group."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def means(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """``REPEATS`` means of resampled clusters, shape (REPEATS,)."""
    names, position = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    sums = np.bincount(position, weights=np.asarray(values, dtype=float), minlength=len(names))
    counts = np.bincount(position, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(0, len(names), (REPEATS, len(names)))
    return np.asarray(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))


def estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of ``values`` and its interval. ``values`` must not be empty."""
    groups = len(set(clusters))
    low, high = np.quantile(means(values, clusters), (0.025, 0.975)) if groups > 1 else (np.nan, np.nan)
    return Estimate(float(np.mean(values)), float(low), float(high), len(values), groups)


def difference(
    first: Sequence[float], first_clusters: Sequence[Hashable], second: Sequence[float],
    second_clusters: Sequence[Hashable],
) -> Estimate:  # fmt: skip
    """By how much the mean of ``second`` is above that of ``first``, whose clusters are others; both not empty."""
    groups = min(len(set(first_clusters)), len(set(second_clusters)))
    gap = means(second, second_clusters, seed=1) - means(first, first_clusters, seed=2)
    low, high = np.quantile(gap, (0.025, 0.975)) if groups > 1 else (np.nan, np.nan)
    whole = float(np.mean(second) - np.mean(first))
    return Estimate(whole, float(low), float(high), len(first) + len(second), groups)
