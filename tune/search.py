"""Ray Tune's side of a search: the trials that it is given, by their number in the study.

A ``SearchAlgorithm`` and no ``Searcher``, which Tune would wrap: trials keep the numbers of the study as their names.
"""

from pathlib import Path
from typing import Any, Protocol

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search import SearchAlgorithm

from tune.places import Place
from tune.study import TrialRecord


class Sweep(Protocol):
    """What the search asks of the sweep, and tells it."""

    def next(self) -> tuple[TrialRecord, Place] | None:
        """The trial to start now, and where; None where there is none now."""

    def over(self) -> bool:
        """Whether no trial will be started any more."""

    def ended(self, number: int, result: dict[str, Any] | None, death: str = "") -> None:
        """Tune has let go of a trial; ``death`` says what became of its process, where it has died."""


class StudySearch(SearchAlgorithm):
    """Ray Tune's interface to a sweep: which trial comes next, and that one has ended."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._parser = sweep, _make_parser()
        self._spec: dict[str, Any] = {}
        self._trials: dict[str, Trial] = {}

    def add_configurations(self, experiments: Any) -> None:
        """Tune's description of the one experiment."""
        (experiment,) = experiments if isinstance(experiments, list) else [experiments]
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        """The next trial, or None where there is none now."""
        found = self._sweep.next()
        if found is None:
            return None
        record, place = found
        name = f"{record.number:05d}_{len(record.attempts)}"
        placement, workers = place.placement, place.workers
        selector = {"bundle_label_selector": [placement.label_selector] * workers} if placement.label_selector else {}
        config = {
            "number": record.number, "point": record.point, "gpus": place.share, "needed": place.needed,
            "environment": dict(placement.env_vars),
        }  # fmt: skip
        needs = PlacementGroupFactory([placement.bundle()] * workers, **selector)
        spec = {**self._spec, "config": config, "resources_per_trial": needs}
        trial = _create_trial_from_spec(spec, self._parser, experiment_tag=str(record.number), trial_id=name)
        self._trials[name] = trial
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended."""
        trial = self._trials.pop(trial_id, None)
        if trial is None:  # Tune says it again where taking note of it has failed
            return
        death = (_told(trial) or "its process has died") if error else ""
        self._sweep.ended(trial.config["number"], result, death)

    def is_finished(self) -> bool:
        """Whether no trial will come any more."""
        return self._finished or self._sweep.over()


def _told(trial: Trial) -> str:
    """What Tune has written of the trial's error; it is in the storage only later."""
    file = Path(trial.error_file or "")
    return file.read_text(errors="replace") if file.is_file() else ""
