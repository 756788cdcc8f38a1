"""A search space over the dotted keys of a workload's config, checked before anything runs.

    space:
      learning_rate: {loguniform: [1.0e-5, 1.0e-3]}
      adapter.rank: {choice: [8, 16, 32]}
      adapter.dropout: {uniform: [0.0, 0.1], when: adapter.rank >= 16}
      warmup_steps: {int: [5, 50]}
    constraints: [adapter.alpha >= adapter.rank]

A point gives each key a value. A key whose ``when`` does not hold has none and stays as the shared config has it; a
point that breaks a constraint, or that the workload refuses, is never run.
"""

import difflib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from tune.conditions import Condition
from tune.ranges import Range, label
from workbench.config import UNVISITED, Config
from workbench.errors import UserError

if TYPE_CHECKING:
    import optuna

C = TypeVar("C", bound=Config)
Point = dict[str, Any]

TRIES = 64
"""Points in which a value is looked for that the workload takes, before it is refused."""


@dataclass(frozen=True)
class Space:
    """The points of ``ranges`` around the shared ``config`` that ``constraints`` and the workload allow."""

    config: Config
    ranges: Mapping[str, Range]
    constraints: Sequence[str] = field(default=())

    @cached_property
    def _when(self) -> dict[str, Condition]:
        return {key: Condition.parse(values.when) for key, values in self.ranges.items() if values.when}

    @cached_property
    def _conditions(self) -> list[Condition]:
        return [Condition.parse(text) for text in self.constraints]

    def check(self) -> None:
        """Raise UserError for a key that the workload has not, naming the nearest, for a value that it never takes,
        for a condition that cannot be answered, and where no point is allowed."""
        known = dotted_keys(self.config.model_dump())
        for key in self.ranges:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
                raise UserError(f"space: no key '{key}'; {hint}")
        self.check_conditions()
        drawn = self.draw(TRIES, random.Random("check"))
        for key, values in self.ranges.items():
            for value in values.extremes:
                self._check_value(key, value, drawn)
        if all(self.why_not(point) for point in drawn):
            raise UserError(f"the space is empty: of {TRIES} points drawn none is allowed, {self.why_not(drawn[0])}")

    def check_conditions(self) -> None:
        """Raise UserError for a condition over a key that is not known, or that is drawn later."""
        known = dotted_keys(self.config.model_dump())
        before: list[str] = []
        try:
            for key in self.ranges:
                condition = self._when.get(key)
                if condition is not None:
                    condition.check(known)
                    if late := [other for other in condition.keys if other in self.ranges and other not in before]:
                        raise UserError(f"space.{key}: 'when' looks at {late[0]}: give that key before it")
                before.append(key)
            for condition in self._conditions:
                condition.check(known)
        except ValueError as error:
            raise UserError(f"space or constraints: {error}") from None

    def _check_value(self, key: str, value: Any, drawn: Sequence[Point]) -> None:
        reasons = []
        for point in [{}, *drawn]:
            try:
                at_point(self.config, {**point, key: value})
                return
            except ValidationError as error:
                reasons.append(_first(error))
        raise UserError(f"space.{key}: {value!r} is refused: {reasons[0]}")

    def why_not(self, point: Point) -> str:
        """Why ``point`` must not run; empty where it may."""
        try:
            values = _flat(at_point(self.config, point).model_dump())
        except ValidationError as error:
            return f"{shown(point)} is refused: {_first(error)}"
        try:
            broken = next((condition.text for condition in self._conditions if not condition.holds(values)), "")
        except ValueError as error:
            raise UserError(f"constraint {error}") from None
        return f"{shown(point)} breaks the constraint '{broken}'" if broken else ""

    def outside(self, point: Point) -> str:
        """What ``point`` has that the space does not, or lacks; empty where it is a point of it."""
        kept = self._keep({key: point.get(key) for key in self.ranges})
        if wrong := [key for key in {**point, **kept} if (key in point) != (key in kept)]:
            return f"a point with these values has the keys {', '.join(kept)}: see '{wrong[0]}'"
        beyond = [key for key, value in point.items() if not self.ranges[key].has(value)]
        return f"{beyond[0]}={point[beyond[0]]} is not among the values of the space" if beyond else ""

    def _counts(self, key: str, point: Point) -> bool:
        """Whether ``key`` has a value where the keys before it are at ``point``."""
        condition = self._when.get(key)
        if condition is None:
            return True
        values = {**_flat(self.config.model_dump()), **point}
        try:
            return condition.holds(values)
        except ValueError as error:
            raise UserError(f"space.{key}: when {error}") from None

    def _keep(self, values: Point) -> Point:
        """Of a value for every key those that count."""
        point: Point = {}
        for key, value in values.items():
            if self._counts(key, point):
                point[key] = value
        return point

    def suggest(self, trial: "optuna.Trial") -> Point:
        """The point of an Optuna trial, drawn key by key as its sampler has it."""
        point: Point = {}
        for key, values in self.ranges.items():
            if self._counts(key, point):
                point[key] = values.suggest(trial, key)
        return point

    def decode(self, params: Mapping[str, Any]) -> Point:
        """The point of an Optuna trial's stored parameters."""
        return {key: values.decode(params[key]) for key, values in self.ranges.items() if key in params}

    def encode(self, point: Point) -> dict[str, Any]:
        """``point`` as an Optuna trial stores it."""
        return {key: label(value) for key, value in point.items()}

    def draw(self, count: int, source: random.Random) -> list[Point]:
        """``count`` points that cover every key evenly, allowed or not: a Latin hypercube (McKay, Beckman and Conover
        1979). Independent draws leave parts of a few points' ranges empty."""
        columns = {key: values.spread(count, source) for key, values in self.ranges.items()}
        return [self._keep({key: column[row] for key, column in columns.items()}) for row in range(count)]

    def grid(self) -> Iterator[Point]:
        """Every allowed point once. Raises UserError for a range that cannot be counted."""
        columns = []
        for key, values in self.ranges.items():
            if values.every is None:
                raise UserError(f"space.{key}: a grid needs values that can be counted: give choice or int")
            columns.append(values.every)
        seen = set()
        for row in _rows(columns):
            point = self._keep(dict(zip(self.ranges, row, strict=True)))
            if (name := identity(point)) not in seen and not self.why_not(point):
                seen.add(name)
                yield point


def _rows(columns: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """``itertools.product``, which keeps every value of a wide range in memory."""
    if not columns:
        yield ()
        return
    for value in columns[0]:
        for rest in _rows(columns[1:]):
            yield (value, *rest)


def at_point(config: C, point: Point) -> C:
    """``config`` with the dotted keys of ``point`` set. Raises pydantic's ValidationError for a wrong value.

    The paths of ``config``, of which the rows are made once, are looked at again only with a text in ``point``, which
    may be a path."""
    data = config.model_dump()
    for key, value in point.items():
        *parents, last = key.split(".")
        level = data
        for parent in parents:
            level = level[parent]
        level[last] = value
    may_be_path = any(isinstance(value, str) for value in point.values())
    return type(config).model_validate(data, context=None if may_be_path else UNVISITED)


def dotted_keys(data: dict[str, Any]) -> list[str]:
    """Every key that holds a value, groups left out."""
    return list(_flat(data))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in data.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def identity(point: Point) -> str:
    """A name that equal points share."""
    return json.dumps(point, sort_keys=True, default=str)


def shown(point: Point) -> str:
    """A point in a line, floats short."""
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in point.items()
    )


def _first(error: ValidationError) -> str:
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
