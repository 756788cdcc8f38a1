"""A/B routes: a name that stands for several models with weights, and the same model for the same user every time."""

import hashlib
from collections.abc import Mapping


def variant(route: str, weights: Mapping[str, float], user: str) -> str:
    """The model that ``user`` gets on ``route``.

    A user's place in [0, 1) is a hash of both, so it is the same in every replica and after every restart, and one
    user's places on two routes have nothing to do with each other.
    """
    hashed = hashlib.sha256(f"{route}\0{user}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(hashed[:8], "big") / 2**64 * sum(weights.values())
    for model, weight in weights.items():
        place -= weight
        if place < 0:
            return model
    return next(model for model in reversed(list(weights)) if weights[model] > 0)  # rounding
