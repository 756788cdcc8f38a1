"""A session of a sweep: Ray Tune runs the trials, the study says which, and remembers what became of them.

Ray Tune's own state is never read again: a session that goes on after a kill or a pause makes a new Tuner, whose search
gives the study's unfinished trials first, each from its last checkpoint.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from typing import Any

from ray import tune
from ray._private.worker import get_dashboard_url  # what ray.init() told
from ray.tune.experiment import Trial

from tune.agenda import Agenda
from tune.config import SweepConfig
from tune.orders import Orders
from tune.outcome import COSTS, Outcomes
from tune.places import DoesNotFit, HostGone, Place, Places
from tune.points import Source
from tune.population import Population, donor_step, give_checkpoint
from tune.purse import Purse
from tune.scheduler import Curve, SweepScheduler, inner_scheduler
from tune.search import StudySearch
from tune.space import at_point, shown
from tune.study import SweepStudy, TrialRecord
from tune.trial import WHERE, TrialActor
from tune.waiting import Waiting
from workbench.config import adopt_environment
from workbench.errors import UserError
from workbench.runs import Run, run_id
from workbench.tracking import read_metrics
from workloads.training.resume import CHECKPOINTS

NOT_TOLD = {"step", "host", "card", "setup", "joules", "done", "outcome", "reason", "facts"}
"""Of a trial's result, what is no metric."""


class Driver:
    """The sweep of one run folder, while a session of it runs."""

    def __init__(
        self, config: SweepConfig, run: Run, study: SweepStudy, source: Source, places: Places, payload: Any
    ) -> None:
        self._config, self._run, self._study, self._places = config, run, study, places
        self._folder = run.artifact("trials")
        self._purse = Purse(config.budget, study)
        self._agenda = Agenda(config, source, study, self._purse)
        self._outcomes = Outcomes(config, run, study, self._folder)
        self._inner = inner_scheduler(config, max(trial_steps(config)))
        self.scheduler = SweepScheduler(self._inner, self, config)
        self._copies = isinstance(self._inner, Population)
        shared = config.config
        if self._copies:  # a trial may go on from any of another's
            shared = shared.model_copy(update={"keep_last": max(trial_steps(config)) // shared.checkpoint_every + 1})
        self._shared = {
            "workload": config.workload, "config": shared, "payload": payload, "folder": str(self._folder),
            "keep_checkpoints": self._copies,
        }  # fmt: skip
        self._held: list[TrialRecord] = []
        """Trials that come next, while no card is free for them."""
        self._live: dict[int, dict[str, Any]] = {}
        """By number the last result of each trial that runs."""
        self._orders = Orders(config, run, study, self._purse, self._folder, self._live.keys())
        self._waiting = Waiting(places, self._orders, run)
        self.error: UserError | None = None

    @property
    def paused(self) -> str:
        """Why the session ends with trials that are not finished; empty where it does not."""
        return self._orders.paused

    def fit(self) -> None:
        """Run trials until the budget is spent or the user pauses.

        Raises UserError for a metric that no trial has, KeyboardInterrupt where the user interrupts it.
        """
        self._close_attempts()
        self._study.write_note("ray", f"http://{get_dashboard_url()}" if get_dashboard_url() else "")
        for trial in self._study.trials():
            if trial.ended and trial.repeats is None:
                self.scheduler.remember(trial.number, trial.curve, trial.spared_at, trial.born)
        adopt_environment({
            "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # of an actor that is stopped by force
            "RAY_AIR_NEW_OUTPUT": "0",  # its tables; the other kind is off
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        })  # fmt: skip
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep tells what became of its trials
        tuner = tune.Tuner(
            tune.with_parameters(TrialActor, shared=self._shared),
            tune_config=tune.TuneConfig(
                num_samples=-1, search_alg=StudySearch(self), scheduler=self.scheduler,
                reuse_actors=not self._config.config.zero_stage,  # DeepSpeed keeps its first process group
                trial_name_creator=_name, trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=f"session-{int(time.time())}", storage_path=str(self._run.folder / "ray"), verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),  # a death is ours to judge: see Outcomes
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        finally:
            self._purse.sign(alive=False)
        if self.error is not None:
            raise self.error
        if self._live:  # Tune takes SIGINT for itself, and returns
            self._run.say(f"interrupted; go on with: workbench tune resume {run_id(self._run.folder)}")
            raise KeyboardInterrupt
        if self._copies and not self.paused:
            for left in self._folder.glob(f"*/{CHECKPOINTS}"):
                shutil.rmtree(left, ignore_errors=True)

    # What the search asks

    def next(self) -> tuple[TrialRecord, Place] | None:
        """The trial to start now, and where; None where there is none now."""
        self._orders.obey()
        if self.paused or self.error or len(self._live) >= self._config.concurrent:
            return None
        gone = ""
        for record in self._upcoming():
            try:
                place = self._place(record)
            except HostGone as error:
                gone = f"no host is left for trial {record.number}: {error}"
                continue
            except DoesNotFit as error:
                self._held.remove(record)
                self._study.end(record.number, "does not fit", str(error))
                self._run.say(f"trial {record.number} does not fit: {error}")
                return None
            if place is not None:
                self._held.remove(record)
                return self._start(record, place)
        if gone:
            self._waiting.lacks_host(gone, alone=not self._live)
        return None

    def _upcoming(self) -> Iterator[TrialRecord]:
        """Trials for which no card was free, then new ones while there is a free card, of which as many may be held as
        may run: a large trial that waits for the large card leaves the small ones to others. All are held."""
        yield from list(self._held)
        while len(self._held) < self._config.concurrent and self._places.has_room():
            record = self._agenda.following(alone=not (self._live or self._held))
            if record is None:
                return
            self._held.append(record)
            yield record

    def _place(self, record: TrialRecord) -> Place | None:
        """Where the trial may run now; None where every card that has room for it is taken. Raises DoesNotFit."""
        chosen = at_point(self._config.config, record.point)
        return self._places.take(record.number, chosen, over_gb=outgrown_gb(record))

    def _start(self, record: TrialRecord, place: Place) -> tuple[TrialRecord, Place]:
        if record.parent is not None:
            own, parents = (self._folder / str(n) / CHECKPOINTS for n in (record.number, record.parent))
            give_checkpoint(parents, record.parent_step, own)
        steps = f"goes on after step {record.steps}" if record.curve else "starts"
        self._run.say(f"trial {record.number} {steps}: {shown(record.point)}")
        self._live[record.number] = {}
        self._waiting.add(record.number, place)
        (self._folder / str(record.number) / WHERE).unlink(missing_ok=True)
        self._study.attempt(record.number, gpus=0.0, memory_gb=place.had_gb)
        return self._study.trial(record.number), place

    def over(self) -> bool:
        """Whether no trial will be started any more."""
        if self._live:
            return False
        return bool(self.paused or self.error) or (not self._held and self._agenda.is_done())

    def ended(self, number: int, result: dict[str, Any] | None, death: str = "") -> None:
        """Tune has let go of a trial."""
        last = self._live.pop(number, {})
        self._places.give_back(number)
        if self._waiting.remove(number):
            self._study.during(number, began=time.time(), joules=0.0)
        verdict = self._orders.forget(number)
        if self._waiting.moves(number):
            self._study.leave(number)
            self._agenda.again(number)
        elif self._outcomes.settle(number, last, result or {}, death, verdict):
            self._agenda.again(number)

    # What the scheduler asks and tells

    def curve(self, number: int) -> Curve:
        """What the trial measured in earlier sessions."""
        return self._study.trial(number).curve

    def born(self, number: int) -> int:
        """The step at which the trial took another's place; 0 of most."""
        return self._study.trial(number).born

    def judged(self, number: int) -> bool:
        """Whether the trial may be stopped early: one that is repeated runs to its end."""
        return self._study.trial(number).repeats is None

    def begun(self, number: int) -> None:
        """The trial's process has begun: from now on it has its cards, and is charged for them."""
        if place := self._waiting.remove(number):
            self._study.during(number, began=time.time(), gpus=place.gpus)

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        """Take note of a look; whether the trial goes on."""
        self.begun(number)
        step, metric = int(result["step"]), self._config.metric
        if missing := [name for name in self._config.metrics if name not in result and name not in COSTS]:
            known = sorted(set(result) - NOT_TOLD - _AUTOMATIC - {"trial_id", "config"})
            self.error = UserError(
                f"metrics: {self._config.workload} does not report '{missing[0]}'; it reports {', '.join(known)}"
            )
            self._orders.tell_all("stopped", "the sweep was ended")
            return False
        self._live[number] = result
        facts = {key: result[key] for key in ("host", "card", "joules") if key in result}
        self._study.during(number, setup=round(result["setup"], 2), **facts)
        self._study.measured(number, step, result[metric])
        self._run.say(f"trial {number}, step {step}: {_word(metric)} {result[metric]:.3f}")
        if self.judged(number):  # one that is repeated comes after the target, and runs to its end
            self._orders.look_at_target(number, step, result[metric])
        self._orders.obey()
        return not self._orders.told(number)

    def stop_early(self, number: int, step: int) -> None:
        """The scheduler stops it; in a population a copy of a better one takes its place."""
        reason = f"{self._config.scheduler.kind} at step {step}"
        if isinstance(self._inner, Population):
            donors = [(donor, donor_step(self._folder / str(donor) / CHECKPOINTS, step))
                      for donor in self._inner.best(step)]  # fmt: skip
            donor, kept = next((pair for pair in donors if pair[1] is not None), (0, None))
            if kept is None:
                self._run.say(f"trial {number} is behind at step {step} and goes on: none ahead has a checkpoint yet")
                return
            self._agenda.replace(number, donor, kept)
            reason += f": one like trial {donor} goes on from its step {kept}"
        self._orders.tell(number, "stopped early", reason)

    def spare(self, number: int, step: int) -> None:
        """The scheduler would have stopped it."""
        self._study.spare(number, step)
        self._run.say(f"trial {number} would be stopped at step {step} and is spared, to see what stopping loses")

    def overdue(self, number: int) -> bool:
        """Whether it has had its time to write a checkpoint."""
        return self._orders.overdue(number)

    def in_vain(self, number: int) -> bool:
        """Whether the trial, whose process has not begun, is to end, or has no host any more: then it begins on
        another, or the sweep pauses."""
        return self._orders.told(number) or self._waiting.in_vain(number)

    def _close_attempts(self) -> None:
        """Trials that a kill cut short ended when they last wrote a row."""
        for trial in self._study.trials():
            if trial.state == "running" and trial.attempts and "ended" not in trial.attempts[-1]:
                rows = read_metrics(self._folder / str(trial.number))
                began = trial.attempts[-1]["began"]
                self._study.leave(trial.number, max([began, *(row["time"] for row in rows)]))


_AUTOMATIC = {
    "timestamp", "date", "pid", "hostname", "node_ip", "time_this_iter_s", "time_total_s", "time_since_restore",
    "training_iteration", "iterations_since_restore", "checkpoint_dir_name", "time",
}  # fmt: skip
"""What Tune adds to every result."""


def trial_steps(config: SweepConfig) -> list[int]:
    """The numbers of steps that trials may have."""
    steps = config.space.get("steps")
    return [config.config.steps, *(map(int, steps.extremes) if steps else ())]


def outgrown_gb(record: TrialRecord) -> float:
    """The most memory of a card that the trial has had and that was too small; 0 where none was."""
    return max((attempt.get("outgrown_gb", 0.0) for attempt in record.attempts), default=0.0)


def _name(trial: Trial) -> str:
    """Trials are named by their number; a second attempt in one session has a folder of its own with Tune."""
    return str(trial.trial_id)


def _word(metric: str) -> str:
    return "held-out loss" if metric == "validation_loss" else metric
