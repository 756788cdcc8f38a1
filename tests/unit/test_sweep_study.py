"""The study of a sweep: what it remembers, and what is proposed next, across processes that come and go."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from tune.config import SweepConfig
from tune.figures import front
from tune.points import Proposer, source_of
from tune.report import StopCheck
from tune.space import identity
from tune.study import FILE, SweepStudy, TrialRecord
from workbench.config import load
from workbench.errors import UserError

LOSS = {"validation_loss": "min"}
SPACE = ["space.learning_rate.loguniform=[0.001, 0.1]", "space.max_length.choice=[64, 128, 256]"]


def sweep(*overrides: str) -> SweepConfig:
    return load(SweepConfig, None, ["config.base=owner/model", *(SPACE if not overrides else []), *overrides])


def propose(config: SweepConfig, study: SweepStudy) -> TrialRecord | None:
    """The next trial, as the driver makes it."""
    source = source_of(config)
    if not study.waiting() and not Proposer(config, source, study).propose():
        return None
    trial = study.ask()
    return study.begin(trial, source.suggest(trial))


def several(config: SweepConfig, study: SweepStudy, count: int) -> list[dict[str, Any]]:
    made = [propose(config, study) for _ in range(count)]
    return [record.point for record in made if record is not None]


def test_a_study_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    record = propose(sweep(), study)
    assert record is not None
    study.attempt(record.number, gpus=0.5)
    study.during(record.number, host="box", card="")
    for step, value in ((5, 2.0), (10, 1.5)):
        study.measured(record.number, step, value)
    study.spare(record.number, 10)
    study.end(record.number, "finished", values={"validation_loss": 1.25}, trained_parameters=7)
    (again,) = SweepStudy(tmp_path, LOSS).trials()
    assert again.point == record.point
    assert (again.state, again.curve, again.values) == ("finished", [(5, 2.0), (10, 1.5)], {"validation_loss": 1.25})
    assert again.attempts[0]["host"] == "box"
    assert again.gpu_seconds == pytest.approx(again.seconds / 2)
    assert (again.facts, again.spared_at) == ({"trained_parameters": 7}, 10)


def test_a_trial_ends_once(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    several(sweep(), study, 1)
    study.end(0, "stopped", "by the user")
    study.end(0, "finished", values={"validation_loss": 1.0})
    assert study.trial(0).state == "stopped"


def test_a_loss_that_is_no_number_is_no_end(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    several(sweep(), study, 1)
    study.end(0, "finished", values={"validation_loss": float("nan")})
    assert study.trial(0).state == "diverged"
    assert study.best(study.trials()) is None


def test_a_line_that_was_cut_off_is_dropped_and_the_study_goes_on(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    first = several(sweep(), study, 2)
    with (tmp_path / FILE).open("a") as journal:
        journal.write('{"op_code": 4, "worker')
    study = SweepStudy(tmp_path, LOSS, repair=True)
    second = several(sweep(), study, 1)
    points = [trial.point for trial in SweepStudy(tmp_path, LOSS).trials()]
    assert points == first + second


def test_the_best_follows_the_direction(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, {"accuracy": "max"}, create=True)
    several(sweep(), study, 3)
    for number, value in enumerate((0.5, 0.9, 0.7)):
        study.end(number, "finished", values={"accuracy": value})
    best = study.best(study.trials())
    assert best is not None
    assert best.number == 1


@pytest.mark.parametrize("searcher", ["spread", "random", "tpe"])
def test_a_sweep_that_goes_on_proposes_what_it_would_have(tmp_path: Path, searcher: str) -> None:
    config = sweep(*SPACE, f"searcher={searcher}", "budget={trials: 6}")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = several(config, SweepStudy(tmp_path / "a", LOSS, create=True), 6)
    several(config, SweepStudy(tmp_path / "b", LOSS, create=True), 3)
    again = SweepStudy(tmp_path / "b", LOSS)
    several(config, again, 3)
    assert [trial.point for trial in again.trials()] == whole
    assert len({identity(point) for point in whole}) == 6


def test_a_grid_ends_when_every_point_was_proposed(tmp_path: Path) -> None:
    config = sweep(
        "space.seed.choice=[1, 2]", "space.max_length.choice=[64, 128]", "searcher=grid",
        "constraints=['seed * max_length < 200']",
    )  # fmt: skip
    study = SweepStudy(tmp_path, LOSS, create=True)
    assert several(config, study, 9) == [
        {"seed": 1, "max_length": 64}, {"seed": 1, "max_length": 128}, {"seed": 2, "max_length": 64}
    ]  # fmt: skip


def test_tpe_draws_where_trials_were_good_and_never_what_is_ruled_out(tmp_path: Path) -> None:
    config = sweep(
        "space.learning_rate.uniform=[0.001, 1]", "searcher=tpe", "budget={trials: 30}",
        "constraints=['learning_rate < 0.9']", "seed=1",
    )  # fmt: skip
    study = SweepStudy(tmp_path, LOSS, create=True)
    for _ in range(30):
        record = propose(config, study)
        assert record is not None
        study.end(record.number, "finished", values={"validation_loss": abs(record.point["learning_rate"] - 0.2)})
    rates = [trial.point["learning_rate"] for trial in study.trials()]
    assert max(rates) < 0.9
    late = [abs(rate - 0.2) for rate in rates[15:]]
    assert sum(late) / len(late) < 0.15


def test_a_point_of_the_users_comes_first(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    mine = {"learning_rate": 0.05, "max_length": 256}
    study.enqueue(mine)
    assert several(sweep(), study, 1) == [mine]


def by_rank(trial: optuna.Trial) -> dict[str, Any]:
    rank = trial.suggest_int("rank", 1, 4)
    return {"adapter.rank": 2**rank, "adapter.alpha": 2.0 ** (rank + 1)}


def test_a_python_function_makes_points(tmp_path: Path) -> None:
    config = sweep(f"function={__name__}:by_rank", "searcher=random")
    source_of(config).check()
    points = several(config, SweepStudy(tmp_path, LOSS, create=True), 3)
    assert all(point["adapter.alpha"] == 2 * point["adapter.rank"] for point in points)
    with pytest.raises(UserError, match="module:name"):
        source_of(sweep("function=nowhere:nothing", "searcher=tpe"))


def test_two_metrics_make_a_study_of_two(tmp_path: Path) -> None:
    both = {"validation_loss": "min", "seconds": "min"}
    config = sweep(*SPACE, "metrics={validation_loss: min, seconds: min}", "searcher=tpe")
    study = SweepStudy(tmp_path, both, create=True)
    for number in range(3):
        propose(config, study)
        study.measured(number, 5, 2.0)
        study.end(number, "finished", values={"validation_loss": 1.0 + number, "seconds": 3.0 - number})
    assert study.trial(2).values == {"validation_loss": 3.0, "seconds": 1.0}
    assert propose(config, study) is not None


def test_tpe_learns_from_trials_of_two_metrics_that_were_pruned(tmp_path: Path) -> None:
    both = {"validation_loss": "min", "seconds": "min"}
    config = sweep(*SPACE, "metrics={validation_loss: min, seconds: min}", "searcher=tpe")
    study = SweepStudy(tmp_path, both, create=True)
    for number in range(15):
        assert propose(config, study) is not None
        study.measured(number, 5, 2.0 + number)
        if number % 3:
            study.end(number, "finished", values={"validation_loss": 1.0 + number, "seconds": 3.0})
        else:
            study.end(number, "stopped early", "asha at step 5")
    assert study.trial(12).curve == [(5, 14.0)]


def test_a_trial_that_is_stopped_while_it_is_paused_has_cost_what_it_had(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    several(sweep(), study, 1)
    study.attempt(0, gpus=1.0)
    began = study.trial(0).attempts[0]["began"]
    study.leave(0, began - 600.0)
    study.end(0, "stopped", "by the user")
    assert study.trial(0).gpu_seconds == pytest.approx(-600.0)


def test_opening_a_study_writes_nothing(tmp_path: Path) -> None:
    several(sweep(), SweepStudy(tmp_path, LOSS, create=True), 1)
    with (tmp_path / FILE).open("a") as journal:
        journal.write('{"op_code": 4, "worker')
    before = (tmp_path / FILE).read_bytes()
    study = SweepStudy(tmp_path, LOSS)
    assert (len(study.trials()), study.is_torn) == (1, True)
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text('{"op_code": 0, "worker')
    with pytest.raises(UserError, match="ended before it had begun"):
        SweepStudy(tmp_path, LOSS)


def test_the_best_of_repeated_trials_is_the_best_on_average(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    points = several(sweep(), study, 3)
    for number, loss in enumerate((1.0, 1.1, 1.2)):
        study.end(number, "finished", values={"validation_loss": loss})
    for number, loss in ((0, 2.0), (1, 1.2)):
        study.enqueue(points[number], repeats=number, seed=1)
        again = propose(sweep(), study)
        assert again is not None
        assert (again.point, again.repeats) == (points[number], number)
        study.end(again.number, "finished", values={"validation_loss": loss})
    best = study.best(study.trials())
    assert best is not None
    assert best.number == 1
    assert study.over_seeds(study.trials()) == {0: [1.0, 2.0], 1: [1.1, 1.2], 2: [1.2]}


def test_a_spared_trial_has_won_only_where_it_beats_every_other_by_one_seed(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, LOSS, create=True)
    points = several(sweep(), study, 3)
    study.spare(2, 5)
    for number, loss in enumerate((0.90, 0.92, 0.91)):
        study.end(number, "finished", values={"validation_loss": loss})
    for number, loss in ((0, 1.1), (1, 0.93)):  # on average the second is the best
        study.enqueue(points[number], repeats=number, seed=1)
        again = propose(sweep(), study)
        assert again is not None
        study.end(again.number, "finished", values={"validation_loss": loss})
    check = StopCheck.of(study, study.trials())
    assert (check.spared, check.won) == (1, 0)
    study.enqueue(points[0])
    again = propose(sweep(), study)
    assert again is not None
    study.spare(again.number, 5)
    study.end(again.number, "diverged")
    check = StopCheck.of(study, study.trials())
    assert (check.spared, check.won) == (2, 0)


def test_the_front_of_two_metrics_has_those_that_none_beats(tmp_path: Path) -> None:
    both = {"validation_loss": "min", "accuracy": "max"}
    study = SweepStudy(tmp_path, both, create=True)
    several(sweep(), study, 4)
    for number, (loss, accuracy) in enumerate([(1.0, 0.5), (2.0, 0.9), (1.5, 0.4), (1.0, 0.3)]):
        study.end(number, "finished", values={"validation_loss": loss, "accuracy": accuracy})
    _, line = front(study, study.trials(), "accuracy", "held-out loss").data
    assert list(zip(line.x, line.y, strict=True)) == [(0.9, 2.0), (0.5, 1.0)]


def late(trial: optuna.Trial) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("rate", 0.1, 1)}


def test_a_constraint_need_not_hold_of_a_functions_first_point(tmp_path: Path) -> None:
    config = sweep(f"function={__name__}:late", "searcher=random", "constraints=['learning_rate < 0.3']")
    source_of(config).check()
    points = several(config, SweepStudy(tmp_path, LOSS, create=True), 3)
    assert all(point["learning_rate"] < 0.3 for point in points)
