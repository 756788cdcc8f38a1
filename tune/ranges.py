"""The values that one key of a search space may have."""

import json
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from tune.conditions import Condition
from workbench.config import Config

if TYPE_CHECKING:
    import optuna

Whole = int
"""Its usual name is a key of Range."""


class Range(Config):
    """The values of one key: exactly one of a list to choose from and a range to draw from, and when it counts."""

    choice: list[Any] | None = Field(None, min_length=1, description="values to choose from")
    uniform: tuple[float, float] | None = Field(None, description="lower and upper bound")
    loguniform: tuple[float, float] | None = Field(None, description="bounds, drawn evenly on a log scale")
    int: tuple[Whole, Whole] | None = Field(None, description="bounds of whole numbers, both included")
    when: str = Field("", description="the key counts only where this holds: adapter.rank >= 16")

    @model_validator(mode="after")
    def _one(self) -> "Range":
        given = [name for name in ("choice", "uniform", "loguniform", "int") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of choice: [a, b], uniform, loguniform and int: [low, high]")
        bounds = self.uniform or self.loguniform or self.int
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the lower bound {bounds[0]:g} is not below the upper {bounds[1]:g}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("a log scale has no place for 0 or less")
        if bounds and not all(map(math.isfinite, bounds)):
            raise ValueError("the bounds of a range are finite")
        return self

    @field_validator("when")
    @classmethod
    def _parsed(cls, text: str) -> str:
        if text:
            Condition.parse(text)
        return text

    @property
    def extremes(self) -> list[Any]:
        """Values that stand for all: each choice, or both bounds."""
        return list(self.choice or self.uniform or self.loguniform or self.int or ())

    @property
    def every(self) -> Sequence[Any] | None:
        """All values, where they can be counted."""
        return range(self.int[0], self.int[1] + 1) if self.int else self.choice

    def has(self, value: Any) -> bool:
        """Whether ``value`` is one of them."""
        low, high = self.int or self.uniform or self.loguniform or (0, 0)
        if self.choice:
            return value in self.choice
        number = isinstance(value, int if self.int else int | float) and not isinstance(value, bool)
        return number and low <= value <= high

    def spread(self, count: Whole, source: random.Random) -> list[Any]:
        """``count`` values in any order: one from each of as many equal parts of the range; of a list, each in turn."""
        if self.choice:
            deck = source.sample(self.choice, len(self.choice))
            values = [deck[turn % len(deck)] for turn in range(count)]
        else:
            values = [self._at((part + source.random()) / count) for part in range(count)]
        source.shuffle(values)
        return values

    def near(self, value: Any, dice: random.Random, resample: float, factors: Sequence[float]) -> Any:
        """A value beside ``value``: drawn anew with probability ``resample``, else the next of the list on either side,
        or times one of ``factors``, within the bounds."""
        if dice.random() < resample:
            return self.spread(1, dice)[0]
        if self.choice:
            place = self.choice.index(value)
            return self.choice[dice.choice([step for step in (place - 1, place + 1) if 0 <= step < len(self.choice)]
                                           or [place])]  # fmt: skip
        low, high = self.int or self.uniform or self.loguniform or (0, 0)
        moved = value * dice.choice(list(factors))
        if self.int:
            moved = math.ceil(moved) if moved > value else math.floor(moved)
        return min(high, max(low, moved))

    def _at(self, share: float) -> Any:
        """The value so far up the range, from 0 to 1."""
        if self.int:
            low, high = self.int
            return min(high, low + math.floor(share * (high - low + 1)))
        if self.uniform:
            return self.uniform[0] + share * (self.uniform[1] - self.uniform[0])
        lowest, highest = self.loguniform or (1.0, 1.0)
        return float(lowest * (highest / lowest) ** share)

    def suggest(self, trial: "optuna.Trial", key: str) -> Any:
        """The value that an Optuna trial has, or now draws, for ``key``."""
        if self.choice:
            return self.decode(trial.suggest_categorical(key, [label(value) for value in self.choice]))
        if self.int:
            return trial.suggest_int(key, *self.int)
        if self.uniform:
            return trial.suggest_float(key, *self.uniform)
        return trial.suggest_float(key, *(self.loguniform or (1.0, 1.0)), log=True)

    def decode(self, stored: Any) -> Any:
        """The value that the study holds as ``stored``: a list is kept there as text."""
        return next((value for value in self.choice or () if label(value) == stored), stored)


def label(value: Any) -> Any:
    """A choice as Optuna stores it."""
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)
