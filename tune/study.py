"""The truth about a sweep across time: an Optuna study in the run folder, which outlives any process.

A journal file rather than SQLite: it is appended to under a lock that works on NFS, a reader (optuna-dashboard) never
blocks a writer, and what a kill cuts off is the last line. What Optuna has no word for is in a trial's user attributes.
"""

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tune.space import Point
from workbench.errors import UserError

FILE = "study.journal"

ENDS = {
    "finished": TrialState.COMPLETE,
    "stopped early": TrialState.PRUNED,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "does not fit": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""How a trial ends, and what Optuna calls it: TPE learns from pruned trials, and takes one without values for bad."""


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows of a trial. ``curve`` is the first metric by step; ``values`` all metrics of a finished one.

    ``repeats`` is the number of the trial that this one does again with another seed. In a population it may go on from
    the checkpoint of ``parent`` at ``parent_step``, in the place of one that ended at step ``born``. ``attempts`` has
    an entry for each time that it ran: host, card, gpus, began, setup and ended (seconds), joules where they are
    counted.
    """

    number: int
    point: Point
    state: str
    curve: list[tuple[int, float]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    spared_at: int = 0
    repeats: int | None = None
    parent: int | None = None
    parent_step: int = 0
    born: int = 0

    @property
    def steps(self) -> int:
        """The last step that was measured."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def value(self) -> float | None:
        """The first metric: of its result where it finished, else at that step."""
        if self.values:
            return next(iter(self.values.values()))
        return self.curve[-1][1] if self.curve else None

    @property
    def ended(self) -> bool:
        """Whether it will not go on."""
        return self.state in ENDS

    @property
    def seconds(self) -> float:
        """On the clock, over all attempts."""
        return sum(attempt["ended"] - attempt["began"] for attempt in self.attempts if "ended" in attempt)

    @property
    def joules(self) -> float | None:
        """Of cards, where they were counted in every attempt; what a killed process took since its last look is not."""
        counted = [float(attempt["joules"]) for attempt in self.attempts if attempt.get("joules") is not None]
        return sum(counted) if counted and len(counted) == len(self.attempts) else None

    @property
    def gpu_seconds(self) -> float:
        """Of cards."""
        return sum(
            (attempt["ended"] - attempt["began"]) * attempt.get("gpus", 0.0)
            for attempt in self.attempts
            if "ended" in attempt
        )


class SweepStudy:
    """The study of one sweep. One process, the driver, changes trials; any may read, and leave orders."""

    def __init__(self, folder: Path, metrics: Mapping[str, str], *, create: bool = False, repair: bool = False) -> None:
        """Open the study of the run in ``folder``, which writes nothing, or make it; ``repair`` is for its one driver.

        Raises UserError where there is none.
        """
        file = folder / FILE
        if not create and not file.is_file():
            raise UserError(f"{folder} has no study: it is no sweep, or one of an older version")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if repair:
            _drop_torn_line(file)
        self.file, self.metrics = file, dict(metrics)
        self._storage = JournalStorage(JournalFileBackend(str(file)))
        if create:
            directions = ["minimize" if way == "min" else "maximize" for way in metrics.values()]
            optuna.create_study(storage=self._storage, study_name=folder.name, directions=directions)
        sampler = optuna.samplers.RandomSampler()  # what is asked for here was enqueued with its values
        try:
            self._study = optuna.load_study(storage=self._storage, study_name=folder.name, sampler=sampler)
        except KeyError:
            raise UserError(f"{file} has no study: the sweep ended before it had begun; start a new one") from None
        if create:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                self._study.set_metric_names(list(metrics))

    # What it knows

    @property
    def is_torn(self) -> bool:
        """Whether the journal ends amid a line, as after a power failure: what is appended to it cannot be read."""
        return not self.file.read_bytes().endswith(b"\n")

    def trials(self) -> list[TrialRecord]:
        """Every trial in the order of its number."""
        return [self._record(frozen) for frozen in self.frozen()]

    def trial(self, number: int) -> TrialRecord:
        """One trial."""
        return self._record(self._storage.get_trial(self._id(number)))

    def frozen(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials as Optuna has them."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def directions(self) -> list[Any]:
        """Optuna's word for min and max, by metric."""
        return list(self._study.directions)

    def note(self, key: str, default: Any = None) -> Any:
        """What was written down of the whole sweep under ``key``."""
        return self._study.user_attrs.get(key, default)

    def write_note(self, key: str, value: Any) -> None:
        """Write down JSON ``value`` under ``key``; orders of the user's go this way too."""
        self._study.set_user_attr(key, value)

    def better(self, value: float, other: float) -> bool:
        """Whether ``value`` of the first metric is better than ``other``."""
        return value < other if next(iter(self.metrics.values())) == "min" else value > other

    def over_seeds(self, trials: Iterable[TrialRecord]) -> dict[int, list[float]]:
        """The first metric of each finished trial, by its number, and of the trials that repeat it with other seeds."""
        metric = next(iter(self.metrics))
        finished = {trial.number: trial for trial in trials if trial.state == "finished"}
        values: dict[int, list[float]] = {n: [t.values[metric]] for n, t in finished.items() if t.repeats is None}
        for trial in finished.values():
            if trial.repeats in values:
                values[trial.repeats].append(trial.values[metric])
        return values

    def best(self, trials: Iterable[TrialRecord]) -> TrialRecord | None:
        """The finished trial with the best first metric, where some were repeated the best mean over seeds of these; of
        equal ones the first."""
        trials = list(trials)
        values = self.over_seeds(trials)
        values = {number: each for number, each in values.items() if len(each) > 1} or values
        sign = 1 if next(iter(self.metrics.values())) == "min" else -1
        best = min(values, key=lambda number: sign * statistics.fmean(values[number]), default=None)
        return next((trial for trial in trials if trial.number == best), None)

    def importances(self) -> dict[str, float]:
        """The share of the first metric's differences that each key explains, by fANOVA; empty where all trials are
        alike or have no key in common."""
        try:
            fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
            first = {} if len(self.metrics) == 1 else {"target": lambda trial: trial.values[0]}
            return optuna.importance.get_param_importances(self._study, evaluator=fanova, **first)
        except (RuntimeError, ValueError):
            return {}

    def contour(self, first: str, second: str, word: str) -> Any:
        """Optuna's figure of the first metric, called ``word``, over two keys."""
        with warnings.catch_warnings(action="ignore"):
            return optuna.visualization.plot_contour(
                self._study, params=[first, second], target=lambda trial: trial.values[0], target_name=word
            )

    # What changes it

    def waiting(self) -> int:
        """How many trials are enqueued."""
        return len(self.frozen(TrialState.WAITING))

    def enqueue(self, params: dict[str, Any], **attributes: Any) -> None:
        """Have a trial of these stored parameters run next; ``attributes`` are ``repeats`` and its ``seed``, or
        ``parent``, ``parent_step`` and ``born``."""
        self._study.enqueue_trial(params, user_attrs=attributes)

    def ask(self) -> optuna.Trial:
        """The next trial, now running: an enqueued one first."""
        return self._study.ask()

    def begin(self, trial: optuna.Trial, point: Point) -> TrialRecord:
        """Write down the point of a trial that was asked for."""
        trial.set_user_attr("point", point)
        return self.trial(trial.number)

    def attempt(self, number: int, **facts: Any) -> None:
        """A trial begins to run, again or for the first time, at ``facts``."""
        self._set(number, "attempts", [*self.trial(number).attempts, {"began": time.time(), **facts}])

    def during(self, number: int, **facts: Any) -> None:
        """Learn more of the attempt that runs."""
        attempts = self.trial(number).attempts
        if attempts and any(attempts[-1].get(key) != value for key, value in facts.items()):
            self._set(number, "attempts", [*attempts[:-1], {**attempts[-1], **facts}])

    def measured(self, number: int, step: int, value: float) -> None:
        """The first metric of a running trial; a step that is done again is overwritten."""
        self._storage.set_trial_intermediate_value(self._id(number), step, value)

    def spare(self, number: int, step: int) -> None:
        """A decision to stop a trial was ignored on purpose."""
        self._set(number, "spared_at", step)

    def end(
        self, number: int, state: str, reason: str = "", values: Mapping[str, float] | None = None, **facts: Any
    ) -> None:
        """A trial has ended as ``state``, with ``values`` if it finished. Nothing happens to one that had ended."""
        if self.trial(number).ended:
            return
        numbers = [float((values or {}).get(metric, math.nan)) for metric in self.metrics]
        if state == "finished" and not all(map(math.isfinite, numbers)):
            state, reason = "diverged", "a metric is no finite number"
        frozen = self._storage.get_trial(self._id(number))
        if frozen.state == TrialState.WAITING:  # Optuna ends only what runs
            self._storage.set_trial_state_values(self._id(number), TrialState.RUNNING)
            self._set(number, "point", frozen.system_attrs.get("fixed_params", {}))
        attempts = self.trial(number).attempts
        if attempts and "ended" not in attempts[-1]:
            self.during(number, ended=time.time())
        self._set(number, "facts", facts)
        self._set(number, "reason", reason)
        self._set(number, "state", state)
        self._study.tell(number, numbers if state == "finished" else None, ENDS[state], skip_if_finished=True)

    def leave(self, number: int, at: float | None = None) -> None:
        """A trial has stopped running, ``at`` a time or now, and will go on from its last checkpoint."""
        self.during(number, ended=at or time.time())

    def _set(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _record(self, frozen: FrozenTrial) -> TrialRecord:
        attrs = frozen.user_attrs
        values = dict(zip(self.metrics, frozen.values or (), strict=False))
        if frozen.state.is_finished():
            told = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early"}.get(frozen.state, "failed")
            state = attrs.get("state", told)
        else:
            state = "queued" if frozen.state == TrialState.WAITING else "running"
        return TrialRecord(
            frozen.number,
            attrs.get("point", {}),
            state,
            sorted(frozen.intermediate_values.items()),
            values,
            attrs.get("attempts", []),
            attrs.get("reason", ""),
            attrs.get("facts", {}),
            attrs.get("spared_at", 0),
            attrs.get("repeats"),
            attrs.get("parent"),
            attrs.get("parent_step", 0),
            attrs.get("born", 0),
        )


def _drop_torn_line(file: Path) -> None:
    """Cut off what a power failure left of a last line: nobody could append to it."""
    with file.open("rb+") as journal:
        data = journal.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            journal.truncate(whole)
