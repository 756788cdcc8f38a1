"""Which point comes next: spread over the space, all of a grid, at random, or as Optuna's TPE learns.

Whatever was proposed is in the study, so a sweep that goes on after a kill proposes what it would have proposed. TPE
(Bergstra et al. 2011; for several metrics Ozaki et al. 2020) draws in a copy of the study in memory: a point that a
constraint rules out never enters the real one.
"""

import copy
import importlib
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from tune.config import SweepConfig
from tune.space import Point, Space, dotted_keys, identity
from tune.study import SweepStudy
from tune.workload import OF_A_PLACE
from workbench.config import Config
from workbench.errors import UserError

TRIES = 256
"""Draws until a point is given up on: the space is used up, or its constraints leave too little of it."""

CHECKED = 64
"""Points of a function, of which its constraints must allow one."""

BLOCK = 16
"""Points of a Latin hypercube where the number of trials is open."""


class Source(Protocol):
    """Where points come from: a Space, or the user's function."""

    def check(self) -> None:
        """Raise UserError for what can never run."""

    def suggest(self, trial: optuna.Trial) -> Point:
        """The point of an Optuna trial."""

    def why_not(self, point: Point) -> str:
        """Why a point must not run; empty where it may."""


class FunctionSource:
    """``module:name``: a function of the user's, from an Optuna trial to overrides of the config's dotted keys."""

    def __init__(self, config: Config, name: str, constraints: Sequence[str] = (), fixed: Collection[str] = ()) -> None:
        """``fixed`` are keys that are the same for all trials. Raises UserError where there is no such function."""
        self._config, self._name, self._fixed = config, name, fixed
        self._space = Space(config, {}, constraints)
        module, _, attribute = name.partition(":")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            self._function: Callable[[optuna.Trial], dict[str, Any]] = getattr(
                importlib.import_module(module), attribute
            )
        except Exception as error:  # the module is the user's, and may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"function={name}: {reason}; give module:name, found from the current folder") from None

    def check(self) -> None:
        """Call it on a trial of its own. Raises UserError for keys and values that the workload refuses."""
        self._space.check_conditions()
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        first, *more = (self.suggest(study.ask()) for _ in range(CHECKED if self._space.constraints else 1))
        reason = self._wrong(first) or Space(self._config, {}).why_not(first)
        if reason or all(self.why_not(point) for point in (first, *more)):
            raise UserError(f"function={self._name}: {reason or self.why_not(first)}")

    def suggest(self, trial: optuna.Trial) -> Point:
        """What it returns for ``trial``."""
        try:
            point = self._function(trial)
        except Exception as error:
            raise UserError(f"function={self._name}: {type(error).__name__}: {error}") from error
        if not isinstance(point, dict):
            raise UserError(
                f"function={self._name} returned {point!r}, and not overrides such as {{'adapter.rank': 8}}"
            )
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in point.items()}

    def why_not(self, point: Point) -> str:
        """Why the workload, or a constraint, refuses it."""
        return self._wrong(point) or self._space.why_not(point)

    def _wrong(self, point: Point) -> str:
        """Which key it must not set."""
        known = dotted_keys(self._config.model_dump())
        if unknown := [key for key in point if key not in known]:
            return f"it sets '{unknown[0]}', which the workload does not have"
        if fixed := [key for key in point if key.partition(".")[0] in self._fixed]:
            return f"it sets '{fixed[0]}', which is the same for all trials: set config.{fixed[0]}"
        return ""


def source_of(config: SweepConfig) -> Source:
    """The space of a sweep, or its function."""
    if config.function:
        return FunctionSource(config.config, config.function, config.constraints, config.of.shared | OF_A_PLACE)
    return Space(config.config, config.space, config.constraints)


class Proposer:
    """Proposes points of ``source`` for the study, each once."""

    def __init__(self, config: SweepConfig, source: Source, study: SweepStudy) -> None:
        self._config, self._source, self._study = config, source, study

    def propose(self) -> bool:
        """Enqueue one more trial; False where no point is left."""
        kind, seen = self._config.searcher, {identity(trial.point) for trial in self._study.trials()}
        if kind == "tpe" or not isinstance(self._source, Space):
            params = self._sampled(seen)
        else:
            points = {"spread": self._spread, "grid": self._source.grid, "random": self._random}[kind]()
            new = (point for point in points if identity(point) not in seen and not self._source.why_not(point))
            point = next(new, None)
            params = None if point is None else self._source.encode(point)
        if params is None:
            return False
        self._study.enqueue(params)
        return True

    def _spread(self) -> Iterator[Point]:
        """Blocks of Latin hypercubes, the first as large as the sweep was when it began."""
        assert isinstance(self._source, Space)
        size = self._study.note("block") or self._config.budget.trials or BLOCK
        if self._study.note("block") is None:
            self._study.write_note("block", size)
        for block in range(TRIES):
            name = f"space {self._config.seed}" + (f" {block}" if block else "")
            yield from self._source.draw(size, random.Random(name))

    def _random(self) -> Iterator[Point]:
        assert isinstance(self._source, Space)
        source = random.Random(f"random {self._config.seed} {len(self._study.frozen())}")
        for _ in range(TRIES):
            yield from self._source.draw(1, source)

    def _sampled(self, seen: set[str]) -> dict[str, Any] | None:
        """Stored parameters of a new allowed point, by Optuna."""
        known = self._study.frozen()
        seed = random.Random(f"sampler {self._config.seed} {len(known)}").randrange(2**31)
        study = optuna.create_study(directions=self._study.directions, sampler=self._sampler(seed))
        study.add_trials(map(self._to_learn_from, (t for t in known if t.state != TrialState.WAITING)))
        for _ in range(TRIES):
            trial = study.ask()
            point = self._source.suggest(trial)
            if identity(point) not in seen and not self._source.why_not(point):
                return trial.params
            study.tell(trial, state=TrialState.PRUNED)  # a pruned trial without values is a bad one to TPE
        return None

    def _to_learn_from(self, trial: FrozenTrial) -> FrozenTrial:
        """``trial``; with several metrics without its curve, by which TPE would rank a pruned one in a study of one."""
        if len(self._config.metrics) == 1:
            return trial
        trial = copy.copy(trial)
        trial.intermediate_values = {}
        return trial

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self._config.searcher == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
