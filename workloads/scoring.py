"""Right or wrong, and how sure one can be of a share of right answers."""

import math
import random
from collections import Counter
from collections.abc import Sequence

Interval = tuple[float, float]


def is_right(task: str, answer: str, truth: str) -> bool:
    """Whether the answer equals the truth; a list of functional groups is right in any order."""
    return _as_set(answer) == _as_set(truth) if task == "groups" else answer == truth


def partial_credit(task: str, answer: str, truth: str) -> float:
    """1 for a right answer; for functional groups the overlap of said and true over their union (Jaccard), for others
    the harmonic mean of the shares of their words that are in the other (F1, Rajpurkar et al. 2016)."""
    if task == "groups":
        said, true = _as_set(answer), _as_set(truth)
        return len(said & true) / len(said | true) if said | true else 1.0
    words, right = Counter(answer.split()), Counter(truth.split())
    both = (words & right).total()
    return 2 * both / (words.total() + right.total()) if both else float(answer == truth)


def _as_set(text: str) -> set[str]:
    return {part.strip() for part in text.removeprefix("groups:").split(",") if part.strip()}


def wilson(right: int, total: int, z: float = 1.96) -> Interval:
    """The Wilson score interval of a share (Wilson 1927), 95% for the default ``z``; (0, 1) without any trial."""
    if not total:
        return 0.0, 1.0
    share = right / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def paired_difference(a: Sequence[bool], b: Sequence[bool], clusters: Sequence[str], *, seed: int) -> Interval:
    """A 95% bootstrap interval of mean(a) - mean(b), for answers to the same questions.

    Whole ``clusters`` (molecules) are drawn: the questions about one molecule are not independent.
    """
    sums: dict[str, tuple[int, int]] = {}
    for x, y, cluster in zip(a, b, clusters, strict=True):
        difference, count = sums.get(cluster, (0, 0))
        sums[cluster] = (difference + int(x) - int(y), count + 1)
    pairs = list(sums.values())
    draw = random.Random(f"bootstrap {seed}")
    means = []
    for _ in range(1000):
        sample = draw.choices(pairs, k=len(pairs))
        means.append(sum(d for d, _ in sample) / sum(n for _, n in sample))
    means.sort()
    return means[24], means[974]
