"""A search space over the dotted keys of a workload's config, checked before anything runs."""

import difflib
import random
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from workbench.config import Config
from workbench.errors import UserError

C = TypeVar("C", bound=Config)


class Range(Config):
    """The values of one key: exactly one of a list to choose from and a range to draw from."""

    choice: list[Any] | None = Field(None, min_length=1, description="values to choose from")
    uniform: tuple[float, float] | None = Field(None, description="lower and upper bound")
    loguniform: tuple[float, float] | None = Field(None, description="bounds, drawn evenly on a log scale")

    @model_validator(mode="after")
    def _one(self) -> "Range":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of choice: [a, b], uniform: [low, high] and loguniform: [low, high]")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the lower bound {bounds[0]:g} is not below the upper {bounds[1]:g}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("a log scale has no place for 0 or less")
        return self

    @property
    def extremes(self) -> list[Any]:
        """Values that stand for all: each choice, or both bounds."""
        return list(self.choice or self.uniform or self.loguniform or ())

    def spread(self, count: int, source: random.Random) -> list[Any]:
        """``count`` values in any order: one from each of as many equal parts of the range; of a list, each in turn."""
        if self.choice:
            deck = source.sample(self.choice, len(self.choice))
            values = [deck[turn % len(deck)] for turn in range(count)]
        else:
            shares = [(part + source.random()) / count for part in range(count)]
            if self.uniform:
                low, high = self.uniform
                values = [low + share * (high - low) for share in shares]
            else:
                low, high = self.loguniform or (1.0, 1.0)
                values = [low * (high / low) ** share for share in shares]
        source.shuffle(values)
        return values


def draw_points(space: dict[str, Range], trials: int, seed: int) -> list[dict[str, Any]]:
    """``trials`` points that cover every key evenly: a Latin hypercube (McKay, Beckman and Conover 1979).

    Independent draws leave parts of a small sweep's ranges empty, and may give one value of a list to all trials.
    """
    source = random.Random(f"space {seed}")
    columns = {key: values.spread(trials, source) for key, values in space.items()}
    return [{key: column[trial] for key, column in columns.items()} for trial in range(trials)]


def at_point(config: C, point: dict[str, Any]) -> C:
    """``config`` with the dotted keys of ``point`` set. Raises pydantic's ValidationError for a wrong value."""
    data = config.model_dump()
    for key, value in point.items():
        *parents, last = key.split(".")
        level = data
        for parent in parents:
            level = level[parent]
        level[last] = value
    return type(config).model_validate(data)


def check_space(config: Config, space: dict[str, Range]) -> None:
    """Raises UserError for a key that the workload has not, naming the nearest, and for values it does not take."""
    known = dotted_keys(config.model_dump())
    for key, values in space.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"space: no key '{key}'; " + (f"did you mean '{near[0]}'?" if near else _list(known)))
        for value in values.extremes:
            try:
                at_point(config, {key: value})
            except ValidationError as error:
                raise UserError(f"space.{key}: {value!r} is refused: {error.errors()[0]['msg']}") from None


def dotted_keys(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key that holds a value, groups left out."""
    keys: list[str] = []
    for key, value in data.items():
        keys += dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _list(keys: list[str]) -> str:
    return f"valid keys: {', '.join(keys)}"
