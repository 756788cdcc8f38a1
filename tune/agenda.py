"""Which trial of a sweep comes next: those that were cut short, those that are enqueued, new points, the best again."""

import random

from tune.config import SweepConfig
from tune.points import Proposer, Source
from tune.population import bred
from tune.purse import Purse
from tune.space import Space
from tune.study import SweepStudy, TrialRecord


class Agenda:
    """What is left to do, by the study."""

    def __init__(self, config: SweepConfig, source: Source, study: SweepStudy, purse: Purse) -> None:
        self._config, self._source, self._study, self._purse = config, source, study, purse
        self._proposer = Proposer(config, source, study)
        self._again = [trial.number for trial in study.trials() if trial.state == "running"]

    def again(self, number: int) -> None:
        """Have a trial that has begun go on."""
        self._again.append(number)

    def following(self, alone: bool) -> TrialRecord | None:
        """The next trial, now running in the study; ``alone``: none runs. None where there is none now."""
        if self._again:
            return self._study.trial(self._again.pop(0))
        if not self._study.waiting() and not self._enqueue(alone):
            return None
        trial = self._study.ask()
        point = self._source.suggest(trial)
        if "repeats" in trial.user_attrs:
            point["seed"] = trial.user_attrs["seed"]
        record = self._study.begin(trial, point)
        if reason := self._source.why_not(point):  # somebody else enqueued it
            self._study.end(trial.number, "failed", reason)
            return None
        return record

    def is_done(self) -> bool:
        """Whether no trial will come any more, where none runs."""
        return not (self._again or self._study.waiting() or self._enqueue(alone=True))

    def replace(self, number: int, donor: int, step: int) -> None:
        """Enqueue a trial that goes on from ``donor``'s checkpoint of ``step`` at a point near it, in the place of
        trial ``number``."""
        assert isinstance(self._source, Space)
        dice = random.Random(f"breed {self._config.seed} {number}")
        point = bred(self._source, self._study.trial(donor).point, dice)
        lost_at = self._study.trial(number).steps
        self._study.enqueue(self._source.encode(point), parent=donor, parent_step=step, born=lost_at)

    def _enqueue(self, alone: bool) -> bool:
        """Enqueue what the study lacks: a new point within the budget, and at the end the best ones again."""
        if self._purse.has_trials() and self._proposer.propose():
            return True
        return alone and self._repeat()

    def _repeat(self) -> bool:
        """Enqueue of the best trials the repeats that the study has not, so also where it was extended since."""
        finished, sign = self._study.over_seeds(self._study.trials()), 1 if self._config.minimises else -1
        top = sorted(finished, key=lambda number: sign * finished[number][0])[: self._config.repeat.top]
        attributes = [trial.user_attrs for trial in self._study.frozen()]
        made = {(each["repeats"], each["seed"]) for each in attributes if "repeats" in each}
        seeds = [self._config.config.seed + turn for turn in range(1, self._config.repeat.seeds)]
        missing = [(number, seed) for seed in seeds for number in top if (number, seed) not in made]
        for number, seed in missing:
            params = {k: v for k, v in self._study.trial(number).point.items() if k in self._config.space}
            encoded = Space(self._config.config, self._config.space).encode(params)
            self._study.enqueue(encoded, repeats=number, seed=seed)
        return bool(missing)
