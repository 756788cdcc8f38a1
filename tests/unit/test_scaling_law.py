"""The scaling law finds the constants that made its points, and says how sure it is."""

import itertools
from typing import Any

import numpy as np
import pytest

from workloads.scaling_law import Law, bootstrap, fit, interval

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)
"""The constants of Hoffmann et al. 2022, equation 10."""
SIZES = [1e5, 3e5, 1e6, 3e6, 1e7]
TOKENS = [1e6, 1e7, 1e8]


def made(law: Law, sizes: list[float], tokens: list[float], noise: float = 0.0) -> Any:
    n, d = np.array(list(itertools.product(sizes, tokens))).T
    draw = np.random.default_rng(0)
    return np.stack((n, d, law.loss(n, d) * np.exp(noise * draw.standard_normal(len(n)))), 1)


def test_the_constants_of_exact_points_are_found() -> None:
    law = fit(made(CHINCHILLA, SIZES, TOKENS))
    assert (law.alpha, law.beta, law.e) == pytest.approx((0.34, 0.28, 1.69), rel=1e-2)
    assert law.loss(1e9, 1e11) == pytest.approx(CHINCHILLA.loss(1e9, 1e11), rel=1e-3)
    assert law.compute_exponent == pytest.approx(0.28 / 0.62, rel=1e-2)


def test_with_the_same_tokens_the_law_is_of_size_alone() -> None:
    law = fit(made(CHINCHILLA, SIZES, [1e7]))
    assert law.b == 0
    assert (law.alpha, law.a) == pytest.approx((0.34, 406.4), rel=2e-2)
    assert law.e == pytest.approx(1.69 + 410.7 * 1e7**-0.28, rel=1e-2)


def test_one_run_gone_wrong_hardly_moves_the_law() -> None:
    points = made(CHINCHILLA, SIZES, TOKENS)
    points[4, 2] *= 1.3
    assert fit(points).alpha == pytest.approx(0.34, rel=0.02)


def test_the_interval_holds_the_truth_and_widens_beyond_the_ladder() -> None:
    points = made(CHINCHILLA, SIZES, [1e7], noise=0.003)
    law = fit(points)
    laws = bootstrap(points, law, 60, seed=0)
    alone = Law(1.69 + 410.7 * 1e7**-0.28, 406.4, 0.34)
    widths = []
    for n in (1e6, 1e8):
        low, high = interval([other.loss(n, 1e7) for other in laws])
        assert 0.99 * low <= alone.loss(n, 1e7) <= 1.01 * high
        widths.append(high - low)
    assert widths[1] > widths[0] > 0


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [(SIZES[:3], TOKENS, "3 sizes: a law takes at least 4"), (SIZES, TOKENS[:2], "two numbers of tokens")],
)
def test_too_little_to_tell_a_law_from_is_refused(sizes: list[float], tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(made(CHINCHILLA, sizes, tokens))
