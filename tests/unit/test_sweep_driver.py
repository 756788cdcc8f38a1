"""A sweep's session from the study's side, with trials that report made losses in the place of Ray Tune's actors."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_cluster import nodes

import tune.orders
import tune.waiting
from cluster.nodes import Node
from tune.config import SweepConfig
from tune.driver import Driver
from tune.places import Places
from tune.points import source_of
from tune.search import StudySearch
from tune.sole import is_driven, sole_driver
from tune.study import SweepStudy, TrialRecord
from tune.trial import ORDER, RESULT
from tune.tune_cli import _add, extend
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import Run, open_run
from workbench.tracking import read_metrics

HOST = Node("here", total={"CPU": 8.0})

SIZED = {"gpu": {"memory": ">=12GB"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a small model, and no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=512, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _looks_at_orders_every_time(monkeypatch: pytest.MonkeyPatch, runs_root: Path) -> None:
    monkeypatch.setattr(tune.orders, "POLL_SECONDS", 0.0)


def sweep(*overrides: str) -> SweepConfig:
    shared = ["config.base=owner/model", "config.steps=40", "config.validate_every=10", "scheduler.grace_steps=10"]
    space = ["space.learning_rate.uniform=[0.1, 1]", "scheduler.spare=0", "concurrent=2"]
    return load(SweepConfig, None, [*shared, *space, *overrides])


def by_rate(record: TrialRecord, step: int) -> float:
    """Lower rates learn better."""
    return float(record.point["learning_rate"]) + 1 / step


@contextmanager
def session(config: SweepConfig, study: SweepStudy | None = None) -> Iterator[tuple[Driver, SweepStudy, Run]]:
    """A driver in a run folder of its own; the study of an earlier one where it is given."""
    with open_run("tune", "run", config) as run:
        study = study or SweepStudy(run.folder, config.metrics, create=True)
        yield Driver(config, run, study, source_of(config), Places(config.config, [HOST]), {}), study, run


@contextmanager
def carded(base: str, resources: dict[str, Any], *overrides: str) -> Iterator[tuple[Driver, SweepStudy]]:
    """A driver of trials that need cards, on the three machines."""
    config = sweep(f"config.base={base}", f"resources={resources}", "config.max_length=64", *overrides)
    with open_run("tune", "run", config) as run:
        study = SweepStudy(run.folder, config.metrics, create=True)
        yield Driver(config, run, study, source_of(config), Places(config.config, nodes()), {}), study


def only_large_cards_hold(driver: Driver, large: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trials that are ``large`` by their config need more than 32 GB."""
    take = driver._places.take
    monkeypatch.setattr(
        driver._places, "take",
        lambda number, chosen, over_gb: take(number, chosen, over_gb=32.0 if large(chosen) else over_gb),
    )  # fmt: skip


def without(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Have ``host`` die, and be missed at once."""
    monkeypatch.setattr(tune.waiting, "member_nodes", lambda: [node for node in nodes() if node.host != host])
    monkeypatch.setattr(tune.waiting, "PATIENCE_SECONDS", 0.0)


class Tune:
    """Runs the trials that the driver gives, each a look in a round; ``meanwhile`` is called before each look."""

    def __init__(
        self, config: SweepConfig, driver: Driver, run: Run, loss: Callable[[TrialRecord, int], float]
    ) -> None:
        self._driver, self._loss, self._folder = driver, loss, run.artifact("trials")
        self._scheduler = driver.scheduler
        self._steps, self._every = config.config.steps, config.config.validate_every
        self.kept: dict[int, int] = {}
        """By trial the step of its checkpoint."""
        self.at_once = 0

    def fit(self, meanwhile: Callable[[int, int], None] = lambda number, step: None) -> None:
        live: dict[int, TrialRecord] = {}
        while not self._driver.over():
            while (found := self._driver.next()) is not None:
                record, _ = found
                live[record.number] = record
                self.kept.setdefault(record.number, record.parent_step)
                self._scheduler.on_trial_add(None, self._trial(record.number))
            self.at_once = max(self.at_once, len(live))
            for number, record in list(live.items()):
                if self._goes_on(record, meanwhile):
                    continue
                del live[number]

    def _goes_on(self, record: TrialRecord, meanwhile: Callable[[int, int], None]) -> bool:
        number = record.number
        step = self.kept[number] = self.kept.get(number, 0) + self._every
        meanwhile(number, step)
        result = {"step": step, "validation_loss": self._loss(record, step), "host": "here", "card": "", "setup": 0.1}
        self._scheduler.on_trial_result(None, self._trial(number), result)
        if (self._folder / str(number) / ORDER).is_file():
            (self._folder / str(number) / ORDER).unlink()
            self._driver.ended(number, {"outcome": "ended"})
            return False
        if step < self._steps:
            return True
        (self._folder / str(number) / RESULT).mkdir(parents=True, exist_ok=True)
        self._driver.ended(number, {"outcome": "finished", "facts/trained_parameters": 7})
        return False

    def _trial(self, number: int) -> Any:
        return SimpleNamespace(config={"number": number, "point": {}}, trial_id=str(number))


def states(study: SweepStudy) -> list[str]:
    return [trial.state for trial in study.trials()]


def test_a_sweep_runs_its_budget_so_many_at_a_time() -> None:
    config = sweep("budget.trials=5", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        made = Tune(config, driver, run, by_rate)
        made.fit()
        assert states(study) == ["finished"] * 5
        assert made.at_once == 2
        assert all(trial.facts == {"trained_parameters": 7} for trial in study.trials())
        assert all(trial.values["validation_loss"] == by_rate(trial, 40) for trial in study.trials())


def test_a_space_may_have_the_steps() -> None:
    config = sweep("budget.trials=1", "scheduler.kind=none", "space.steps.choice=[40]")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        assert states(study) == ["finished"]
        assert read_metrics(run.folder)[-1]["steps"] == 40


def test_a_trial_of_which_tune_says_twice_that_it_has_ended_ends_once() -> None:
    config = sweep("budget.trials=1")
    with session(config) as (driver, _, _):
        StudySearch(driver).on_trial_complete("00000_1", error=True)


def test_the_value_of_a_trial_that_ended_by_itself_is_that_of_the_weights_that_are_kept() -> None:
    config = sweep("budget.trials=1", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        assert driver.next() is not None
        driver.reported(0, {"step": 20, "validation_loss": 0.9, "host": "here", "card": "", "setup": 0.1})
        run.artifact("trials", "0", RESULT).mkdir(parents=True)
        driver.ended(0, {"outcome": "finished", "facts/kept/step": 10, "facts/kept/validation_loss": 0.7})
        assert (study.trial(0).value, study.trial(0).curve) == (0.7, [(20, 0.9)])


def test_those_behind_are_stopped_early_and_the_reason_is_kept() -> None:
    config = sweep("budget.trials=8")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        stopped = [trial for trial in study.trials() if trial.state == "stopped early"]
        assert stopped and set(states(study)) == {"finished", "stopped early"}
        assert all(trial.reason.startswith("asha at step") for trial in stopped)
        best = study.best(study.trials())
        assert best is not None
        assert best.point["learning_rate"] == min(trial.point["learning_rate"] for trial in study.trials())


def test_a_paused_sweep_leaves_its_trials_and_another_session_ends_them() -> None:
    config = sweep("budget.trials=4", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        first = Tune(config, driver, run, by_rate)
        first.fit(lambda number, step: study.write_note("pause", 1.0) if (number, step) == (1, 20) else None)
        assert driver.paused == "the user has paused it"
        assert states(study) == ["running", "running"]
        before = study.trials()
        study.write_note("pause", None)
        with session(config, study) as (again, _, later):
            second = Tune(config, again, later, by_rate)
            second.kept = first.kept
            second.fit()
        assert states(study) == ["finished"] * 4
        assert [len(trial.attempts) for trial in study.trials()] == [2, 2, 1, 1]
        assert study.trials()[0].point == before[0].point


def test_one_trial_is_stopped_by_the_user() -> None:
    config = sweep("budget.trials=3", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit(
            lambda number, step: study.write_note("stop", [1]) if (number, step) == (1, 10) else None
        )
        assert states(study) == ["finished", "stopped", "finished"]
        assert study.trial(1).reason == "by the user"


def test_in_a_population_copies_of_the_better_take_the_places_of_the_worse() -> None:
    config = sweep(
        "scheduler.kind=pbt", "scheduler.perturb_steps=10", "config.checkpoint_every=10", "budget.trials=4",
        "concurrent=4",
    )  # fmt: skip
    with session(config) as (driver, study, run):

        def keep(number: int, step: int) -> None:
            run.artifact("trials", str(number), "checkpoints", f"step-{step:08}", "history.json").write_text("{}")

        Tune(config, driver, run, by_rate).fit(keep)
        trials = study.trials()
        copies = [trial for trial in trials if trial.parent is not None]
        assert len(trials) - len(copies) == 4
        assert copies and set(states(study)) == {"finished", "stopped early"}
        replaced = [trial for trial in trials if trial.state == "stopped early"]
        assert len(replaced) == len(copies)
        for copy in copies:
            assert copy.parent is not None
            parent = trials[copy.parent]
            assert 0.1 <= copy.point["learning_rate"] <= 1
            assert copy.curve[0][0] == copy.parent_step + 10
            assert f"one like trial {parent.number} goes on from its step {copy.parent_step}" in " ".join(
                trial.reason for trial in replaced
            )


def test_a_trial_that_was_told_to_end_and_died_has_ended_so() -> None:
    config = sweep("budget.trials=1", "scheduler.kind=none")
    with session(config) as (driver, study, _):
        assert driver.next() is not None
        driver.stop_early(0, 10)
        driver.ended(0, None, "gone")
        assert states(study) == ["stopped early"]


def test_a_process_that_was_killed_for_memory_is_tried_once_more() -> None:
    config = sweep("budget.trials=1")
    with session(config) as (driver, study, _):
        for _ in range(2):
            assert driver.next() is not None
            driver.ended(0, None, "it was killed due to the node running low on memory.")
        assert states(study) == ["does not fit"]
        assert "low on memory" in study.trial(0).reason


def test_a_trial_that_has_not_begun_ends_at_once_where_the_sweep_pauses() -> None:
    config = sweep("budget.trials=1")
    with session(config) as (driver, study, _):
        assert driver.next() is not None
        assert not driver.in_vain(0)
        study.write_note("pause", 1.0)
        assert driver.next() is None
        assert driver.in_vain(0)
        driver.ended(0, None)
        assert driver.over()
        assert states(study) == ["running"]


def test_a_target_ends_the_others() -> None:
    config = sweep("budget={trials: 6, target: 0.3}", "scheduler.kind=none", "concurrent=6")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        reached = study.note("reached")["trial"]
        assert states(study).count("finished") == 1
        assert study.trial(reached).state == "finished"


def test_a_sweep_that_is_extended_after_its_target_goes_on() -> None:
    config = sweep("budget={trials: 6, target: 0.3}", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        extend(str(run.folder), add="{learning_rate: 0.9}")
        assert study.note("reached") is None
        with session(config, study) as (again, _, later):
            Tune(config, again, later, by_rate).fit()
        (added,) = [trial for trial in study.trials() if trial.point == {"learning_rate": 0.9}]
        assert added.state == "finished"


def test_a_sweep_without_a_number_of_trials_pauses_where_all_fail() -> None:
    config = sweep("budget={target: 0.01}", "scheduler.kind=none")
    with session(config) as (driver, study, _):
        while not driver.over():
            if (found := driver.next()) is not None:
                driver.ended(found[0].number, {"outcome": "failed", "reason": "KeyError: 'x'"})
        assert states(study).count("failed") == 10
        assert driver.paused == "10 trials in a row have no result, the last: KeyError: 'x'"


def test_hours_of_cards_that_are_spent_pause_the_sweep() -> None:
    config = sweep("budget={trials: 4, gpu_hours: 1.0e-12}")
    with session(config) as (driver, study, run):
        study.enqueue({"learning_rate": 0.5})
        found = driver.next()
        assert found is not None
        driver.scheduler.on_trial_add(None, SimpleNamespace(config={"number": 0}))
        driver.begun(0)
        study.during(0, gpus=1.0)
        Tune(config, driver, run, by_rate)._goes_on(found[0], lambda number, step: None)
        assert driver.paused.endswith("GPU-hours are spent")
        assert driver.over()
        assert states(study) == ["running"]


def test_a_finished_sweep_is_extended() -> None:
    config = sweep("budget.trials=2", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        study.write_note("budget", {"trials": 3})
        with session(config, study) as (again, _, later):
            Tune(config, again, later, by_rate).fit()
        assert states(study) == ["finished"] * 3
        assert [len(trial.attempts) for trial in study.trials()] == [1, 1, 1]


def test_the_best_are_repeated_with_other_seeds() -> None:
    config = sweep("budget.trials=4", "repeat={top: 2, seeds: 3}")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, lambda record, step: by_rate(record, step) + 0.01 * record.point.get("seed", 0)).fit()
        repeats = [trial for trial in study.trials() if trial.repeats is not None]
        assert sorted(trial.point["seed"] for trial in repeats) == [1, 1, 2, 2]
        assert {trial.state for trial in repeats} == {"finished"}
        assert sorted(len(values) for values in study.over_seeds(study.trials()).values())[-2:] == [3, 3]


def test_repeats_run_to_their_end_after_a_target_was_reached() -> None:
    config = sweep("budget={trials: 6, target: 0.3}", "scheduler.kind=none", "repeat={top: 1, seeds: 2}")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        (repeat,) = [trial for trial in study.trials() if trial.repeats is not None]
        assert repeat.repeats == study.note("reached")["trial"]
        assert repeat.state == "finished"


def test_a_better_trial_of_an_extended_sweep_is_repeated_too_and_can_be_the_best() -> None:
    config = sweep("budget.trials=2", "scheduler.kind=none", "repeat={top: 1, seeds: 2}")
    with session(config) as (driver, study, run):
        Tune(config, driver, run, by_rate).fit()
        assert len(study.trials()) == 3
        _add(config, study, "{learning_rate: 0.1}")
        with session(config, study) as (again, _, later):
            Tune(config, again, later, by_rate).fit()
        added, repeat = study.trials()[3:]
        assert (added.point, added.repeats, repeat.repeats) == ({"learning_rate": 0.1}, None, added.number)
        best = study.best(study.trials())
        assert best is not None
        assert best.number == added.number


def test_a_metric_that_is_never_reported_is_found_at_the_first_report() -> None:
    config = sweep("metrics={accuracy: max}", "scheduler.kind=none")
    with session(config) as (driver, _, run):
        made = Tune(config, driver, run, by_rate)
        made.fit()
        assert isinstance(driver.error, UserError)
        assert "does not report 'accuracy'; it reports validation_loss" in str(driver.error)
        assert set(made.kept.values()) == {10}


def test_a_point_that_somebody_enqueued_and_no_trial_may_have_fails_with_its_reason() -> None:
    config = sweep("budget.trials=1", "constraints=['learning_rate < 0.6']", "scheduler.kind=none")
    with session(config) as (driver, study, run):
        study.enqueue({"learning_rate": 0.9})
        study.write_note("budget", {"trials": 2})
        Tune(config, driver, run, by_rate).fit()
        assert states(study) == ["failed", "finished"]
        assert "breaks the constraint" in study.trial(0).reason


def test_a_trial_that_ran_out_of_memory_is_tried_once_on_a_larger_card(base: str) -> None:
    with carded(base, SIZED, "budget.trials=1") as (driver, study):
        sizes = []
        while not driver.over():
            found = driver.next()
            assert found is not None
            sizes.append(found[1].memory_gb)
            driver.ended(0, {"outcome": "does not fit", "reason": "CUDA out of memory"})
        assert sizes == [16, 32]
        assert (study.trial(0).state, study.trial(0).reason) == ("does not fit", "CUDA out of memory")
        assert len(study.trial(0).attempts) == 2


def test_one_that_ran_out_of_its_share_of_a_card_gets_the_whole_card(base: str) -> None:
    with carded(base, {"gpu": "rtx-pro-6000", "share": 0.25}, "budget.trials=1") as (driver, study):
        shares = []
        while not driver.over():
            found = driver.next()
            assert found is not None
            shares.append(found[1].share)
            driver.ended(0, {"outcome": "does not fit", "reason": "CUDA out of memory"})
        assert shares == [0.25, 1]
        assert [attempt["memory_gb"] for attempt in study.trial(0).attempts] == [24, 96]


@pytest.mark.parametrize("resources", [SIZED, {"gpu": "rtx-pro-6000"}])
def test_one_that_was_killed_for_its_hosts_memory_is_tried_where_it_was(base: str, resources: dict[str, Any]) -> None:
    with carded(base, resources, "budget.trials=1") as (driver, study):
        sizes = []
        while not driver.over():
            found = driver.next()
            assert found is not None
            sizes.append(found[1].memory_gb)
            driver.ended(0, None, "it was killed due to the node running low on memory.")
        assert sizes in ([16, 16], [96, 96])
        assert study.trial(0).state == "does not fit"
        assert "low on memory" in study.trial(0).reason


def test_a_trial_whose_host_is_gone_before_it_begins_is_placed_on_another(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with carded(base, SIZED, "budget.trials=1") as (driver, study):
        found = driver.next()
        assert found is not None and set(found[1].placement.resources) == {"rtx-5060-ti"}
        assert not driver.in_vain(0)
        without(monkeypatch, "linux-box")
        assert driver.in_vain(0)
        driver.ended(0, None)  # Tune has stopped it
        found = driver.next()
        assert found is not None and found[1].memory_gb == 32
        assert not driver.in_vain(0)
        assert not driver.paused
        assert study.trial(0).seconds == pytest.approx(0, abs=0.1)


def test_a_trial_that_needs_the_card_of_a_host_that_is_gone_waits_and_pauses_the_sweep_at_its_end(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with carded(base, SIZED, "budget.trials=2", "concurrent=2") as (driver, study):
        for rate in (0.9, 0.2):
            study.enqueue({"learning_rate": rate})
        only_large_cards_hold(driver, lambda chosen: chosen.learning_rate > 0.5, monkeypatch)
        assert [found[1].memory_gb for _ in range(2) if (found := driver.next())] == [96, 16]
        driver.begun(1)
        without(monkeypatch, "system-a")
        assert driver.in_vain(0)
        driver.ended(0, None)
        assert driver.next() is None
        assert not driver.paused
        driver.ended(1, {"outcome": "diverged"})
        monkeypatch.setattr(tune.waiting, "PATIENCE_SECONDS", 60.0)
        assert driver.next() is None
        assert driver.paused == "no host is left for trial 0: no host that is up has rtx-pro-6000"
        assert driver.over()
        assert study.trial(0).state == "running"


def test_a_trial_is_charged_from_when_its_process_begins(base: str) -> None:
    with carded(base, SIZED, "budget.trials=2", "concurrent=2") as (driver, study):
        for _ in range(2):
            assert driver.next() is not None
        time.sleep(0.2)
        driver.begun(0)
        driver.begun(0)
        driver.ended(0, {"outcome": "diverged"})
        driver.ended(1, None)  # in vain
        assert study.trial(0).gpu_seconds == pytest.approx(study.trial(0).seconds)
        assert 0 < study.trial(0).seconds < 0.2
        assert (study.trial(1).gpu_seconds, study.trial(1).joules) == (0, 0)
        assert study.trial(1).seconds == pytest.approx(0, abs=0.1)


def test_a_trial_that_is_stopped_or_paused_keeps_the_joules_that_it_told_at_its_end() -> None:
    config = sweep("budget.trials=2", "scheduler.kind=none")
    with session(config) as (driver, study, _):
        for _ in range(2):
            assert driver.next() is not None
        for number in range(2):
            driver.begun(number)
            study.during(number, joules=None)
        driver.stop_early(0, 10)
        for number in range(2):
            driver.ended(number, {"outcome": "ended", "joules": 7.0})
        assert [trial.joules for trial in study.trials()] == [7, 7]


def test_a_trial_whose_process_died_too_often_has_failed() -> None:
    config = sweep("budget.trials=1")
    with session(config) as (driver, study, _):
        for _ in range(3):
            assert driver.next() is not None
            driver.ended(0, None, "worker 1: gone")
        assert states(study) == ["failed"]
        assert study.trial(0).reason == "its process died 3 times, last: worker 1: gone"
        assert len(study.trial(0).attempts) == 3


def test_trials_that_wait_for_a_taken_card_leave_the_others_to_those_behind_them(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with carded(base, SIZED, "budget.trials=5", "concurrent=3") as (driver, study):
        for rate in (0.9, 0.8, 0.7, 0.2, 0.3):
            study.enqueue({"learning_rate": rate})
        only_large_cards_hold(driver, lambda chosen: chosen.learning_rate > 0.5, monkeypatch)
        started = [found for _ in range(4) if (found := driver.next())]
        assert [(record.point["learning_rate"], place.memory_gb) for record, place in started] == [
            (0.9, 96), (0.2, 16), (0.3, 32),
        ]  # fmt: skip
        assert not driver.over()
        driver.ended(0, {"outcome": "diverged"})
        following = driver.next()
        assert following is not None and following[0].point["learning_rate"] == 0.8


def test_no_more_trials_are_held_than_may_run(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with carded(base, SIZED, "budget.trials=9", "concurrent=3") as (driver, study):
        only_large_cards_hold(driver, lambda chosen: True, monkeypatch)
        assert [found[1].memory_gb for _ in range(4) if (found := driver.next())] == [96]
        assert len(study.trials()) == 4


def test_none_is_held_while_every_card_is_taken(base: str) -> None:
    with carded(base, {"gpu": "rtx-pro-6000"}, "budget.trials=9", "concurrent=3") as (driver, study):
        assert [found[1].memory_gb for _ in range(4) if (found := driver.next())] == [96]
        assert len(study.trials()) == 1


def test_a_sweep_has_one_driver_whose_lock_ends_with_its_process(tmp_path: Path) -> None:
    assert not is_driven(tmp_path)
    holding = f"import time\nfrom pathlib import Path\nfrom tune.sole import sole_driver\n" \
        f"with sole_driver(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert is_driven(tmp_path)
        with pytest.raises(UserError, match="another command drives it"), sole_driver(tmp_path):
            pass
        other.kill()
    assert not is_driven(tmp_path)
