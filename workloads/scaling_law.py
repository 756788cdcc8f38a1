"""The law by which loss falls with parameters N and training tokens D, from finished runs:

    L(N, D) = E + A / N^alpha + B / D^beta

    law = fit(points)                                   # rows of N, D, L
    low, high = interval([other.loss(n, d) for other in bootstrap(points, law, 200, seed=0)])

Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556, section 3.3 and appendix D.2: the Huber loss between the logs of
measured and predicted loss, minimised by L-BFGS from many starts. It is summed and scaled, because L-BFGS stops too
soon at small numbers (Besiroglu et al. 2024, arXiv:2404.10102). Where all runs had the same tokens, B / D^beta is a
part of E, and the law is of N alone.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

HUBER = 1e-3
"""Errors of the log beyond this count linearly: the paper's."""

EXPONENTS = (0.1, 0.3, 0.6, 1.0)
"""Where the search for each exponent starts."""

BOUNDS = {"log": (-30.0, 30.0), "exponent": (0.01, 3.0)}
"""What is looked for: logs of E, A and B (A and B at the ladder's middle), and exponents."""

LEAST_SIZES = 4
"""A law of N has three constants: fewer sizes would be met exactly, whatever they are."""


@dataclass(frozen=True)
class Law:
    """The constants; loss in nats per token. ``b`` is 0 where tokens did not vary."""

    e: float
    a: float
    alpha: float
    b: float = 0.0
    beta: float = 1.0

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """The loss of a model of so many parameters after so many tokens."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.e + self.a * n**-self.alpha + self.b * d**-self.beta

    @property
    def compute_exponent(self) -> float:
        """How the best number of parameters grows with compute: N ~ C^this, for C = 6 N D (the paper's equation 4)."""
        return self.beta / (self.alpha + self.beta)


def fit(points: ArrayLike) -> Law:
    """The law of ``points`` (R, 3): parameters, tokens and loss of each run.

    Raises ValueError for fewer than four sizes, or two numbers of tokens, which say nothing about an exponent.
    """
    n_R, d_R, loss_R = _columns(points)
    if len(set(n_R)) < LEAST_SIZES:
        raise ValueError(f"{len(set(n_R))} sizes: a law takes at least {LEAST_SIZES}")
    if len(set(d_R)) == 2:
        raise ValueError("two numbers of tokens: a law takes one, the same for all sizes, or at least three")
    return min((_search(points, start) for start in _starts(n_R, d_R, loss_R)), key=lambda found: found[0])[1]


def bootstrap(points: ArrayLike, law: Law, draws: int, seed: int) -> list[Law]:
    """Laws of ``draws`` ladders like this one: the law's losses with its own errors dealt anew (Efron and Tibshirani
    1993, section 9.4), which are enlarged by what the fit has taken up of them. Draws of whole runs would leave too few
    sizes."""
    n_R, d_R, loss_R = _columns(points)
    constants = 3 if law.b == 0 else 5
    error_R = np.log(loss_R / law.loss(n_R, d_R)) * math.sqrt(len(n_R) / max(1, len(n_R) - constants))
    generator = np.random.default_rng(seed)
    laws = []
    for _ in range(draws):
        loss_like_R = law.loss(n_R, d_R) * np.exp(generator.choice(error_R, len(error_R)))
        laws.append(_search(np.stack((n_R, d_R, loss_like_R), 1), law)[1])
    return laws


def interval(values: Sequence[ArrayLike], level: float = 0.95) -> tuple[Floats, Floats]:
    """The middle ``level`` of ``values``, place by place."""
    low, high = np.quantile(np.asarray(values, float), ((1 - level) / 2, (1 + level) / 2), axis=0)
    return low, high


def _columns(points: ArrayLike) -> tuple[Floats, Floats, Floats]:
    columns = np.asarray(points, float).T
    return columns[0], columns[1], columns[2]


def _starts(n_R: Floats, d_R: Floats, loss_R: Floats) -> list[Law]:
    """For each pair of exponents, the constants that then fit best by least squares, none below zero."""
    from scipy.optimize import nnls

    varied = len(set(d_R)) > 1
    starts = []
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS if varied else (1.0,)):
        terms = [np.ones_like(n_R), (n_R / _middle(n_R)) ** -alpha] + [(d_R / _middle(d_R)) ** -beta] * varied
        e, a, *b = nnls(np.stack(terms, 1) / loss_R[:, None], np.ones_like(loss_R))[0]
        tokens = max(b[0], 1e-3) * _middle(d_R) ** beta if varied else 0.0
        starts.append(Law(max(e, 1e-3), max(a, 1e-3) * _middle(n_R) ** alpha, alpha, tokens, beta))
    return starts


def _search(points: ArrayLike, start: Law) -> tuple[float, Law]:
    """L-BFGS from ``start``: the sum of Huber losses that it comes to, and the law."""
    from scipy.optimize import minimize

    n_R, d_R, loss_R = _columns(points)
    varied = start.b > 0
    middle_n, middle_d = _middle(n_R), _middle(d_R)
    x_R, y_R = np.log(n_R / middle_n), np.log(d_R / middle_d)

    def objective(theta: Floats) -> tuple[float, Floats]:
        e, a, alpha, b, beta = theta if varied else (*theta, -math.inf, 0.0)
        terms_3R = np.stack((np.full_like(x_R, e), a - alpha * x_R, b - beta * y_R))
        log_R = np.logaddexp.reduce(terms_3R)
        error_R = (log_R - np.log(loss_R)) / HUBER
        size_R = np.abs(error_R)
        total = np.where(size_R <= 1, error_R**2 / 2, size_R - 0.5).sum()
        slope_R = np.clip(error_R, -1, 1) / HUBER
        share_3R = np.exp(terms_3R - log_R) * slope_R
        gradient = [share_3R[0], share_3R[1], -share_3R[1] * x_R, share_3R[2], -share_3R[2] * y_R]
        return float(total), np.array([part.sum() for part in gradient[: 5 if varied else 3]])

    log, exponent = BOUNDS["log"], BOUNDS["exponent"]
    theta = [math.log(start.e), math.log(start.a) - start.alpha * math.log(middle_n), start.alpha]
    if varied:
        theta += [math.log(start.b) - start.beta * math.log(middle_d), start.beta]
    bounds = [log, log, exponent, log, exponent][: len(theta)]
    found = minimize(
        objective, np.array(theta), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8, "maxls": 50},
    )  # fmt: skip
    e, a, alpha = (float(value) for value in found.x[:3])
    law = Law(math.exp(e), math.exp(a) * middle_n**alpha, alpha)
    if varied:
        b, beta = (float(value) for value in found.x[3:])
        law = Law(law.e, law.a, alpha, math.exp(b) * middle_d**beta, beta)
    return float(found.fun), law


def _middle(values: Floats) -> float:
    """The geometric mean: powers of what is divided by it stay near one."""
    return float(np.exp(np.log(values).mean()))
