"""Population-based training: who is behind, who is copied, and what the copies try."""

import random
from pathlib import Path
from typing import Any

import pytest

from tune.config import SweepConfig
from tune.points import source_of
from tune.population import Population, bred, donor_step, give_checkpoint
from tune.ranges import Range
from tune.scheduler import Entrant
from tune.space import Space
from workbench.config import load
from workbench.errors import UserError
from workloads.training.checkpoint import complete, step_of

KEYS = [
    "config.base=owner/model", "config.steps=40", "config.validate_every=10", "config.checkpoint_every=10",
    "scheduler.kind=pbt", "scheduler.perturb_steps=10", "budget.trials=4", "concurrent=4",
    "space={learning_rate: {loguniform: [0.001, 0.1]}, adapter.rank: {choice: [4, 8, 16]}}",
]  # fmt: skip


def config(*more: str) -> SweepConfig:
    return load(SweepConfig, None, [*KEYS, *more])


def stopped(population: Population, step: int, losses: dict[int, float], born: int = 0) -> list[int]:
    """The trials that are stopped as they come to ``step`` one after the other."""
    said = {
        number: population.on_trial_result(None, Entrant(str(number), born), {"step": step, "validation_loss": loss})
        for number, loss in losses.items()
    }
    return [number for number, word in said.items() if word == "STOP"]


def test_who_comes_behind_is_stopped_and_the_best_are_copied() -> None:
    population = Population(config())
    assert stopped(population, 10, {0: 1.0, 1: 0.9, 2: 0.5, 3: 2.0}) == [3]
    assert population.best(10) == [2]


def test_the_first_at_a_rung_is_never_behind_and_looks_between_rungs_do_not_count() -> None:
    population = Population(config())
    assert stopped(population, 9, {0: 9.0, 1: 1.0}) == []
    assert stopped(population, 10, {0: 9.0}) == []


def test_one_that_took_anothers_place_is_judged_from_the_next_rung_on() -> None:
    population = Population(config())
    stopped(population, 20, {0: 1.0, 1: 0.9, 2: 0.8})
    assert stopped(population, 20, {7: 9.0}, born=20) == []
    stopped(population, 30, {0: 1.0, 1: 0.9, 2: 0.8})
    assert stopped(population, 30, {7: 9.0}, born=20) == [7]


def test_more_may_be_better() -> None:
    population = Population(config("metrics={validation_loss: max}"))
    assert stopped(population, 10, {0: 1.0, 1: 0.9}) == [1]


def test_a_copy_keeps_what_its_checkpoint_is_made_for_and_moves_the_rest_within_the_space() -> None:
    made = config()
    space, dice = source_of(made), random.Random(3)
    assert isinstance(space, Space)
    children = [bred(space, {"learning_rate": 0.09, "adapter.rank": 8}, dice) for _ in range(50)]
    assert {child["adapter.rank"] for child in children} == {8}
    rates = [child["learning_rate"] for child in children]
    assert all(0.001 <= rate <= 0.1 for rate in rates)
    assert any(rate == pytest.approx(0.072) for rate in rates) and 0.1 in rates


def test_a_copy_meets_the_constraints() -> None:
    space = source_of(config("constraints=['learning_rate <= 0.05']"))
    assert isinstance(space, Space)
    dice = random.Random(3)
    point = {"learning_rate": 0.049, "adapter.rank": 8}
    assert all(bred(space, point, dice)["learning_rate"] <= 0.05 for _ in range(50))


@pytest.mark.parametrize(
    ("given", "value", "expected"),
    [
        ({"choice": ["a", "b", "c"]}, "a", {"b"}),
        ({"choice": ["a", "b", "c"]}, "b", {"a", "c"}),
        ({"choice": ["a"]}, "a", {"a"}),
        ({"int": [1, 9]}, 2, {1, 3}),
        ({"int": [1, 9]}, 9, {7, 9}),
        ({"uniform": [0.0, 1.0]}, 0.5, {0.4, 0.6}),
    ],
)
def test_a_value_beside_another(given: dict[str, Any], value: Any, expected: set[Any]) -> None:
    dice = random.Random(1)
    values = Range.model_validate(given)
    assert {values.near(value, dice, 0.0, (0.8, 1.2)) for _ in range(40)} == expected


def test_a_checkpoint_is_given_once(tmp_path: Path) -> None:
    donor, child = tmp_path / "0", tmp_path / "1"
    for step in (10, 20):
        (donor / f"step-{step:08}").mkdir(parents=True)
        (donor / f"step-{step:08}" / "history.json").write_text(str(step))
    assert (donor_step(donor, 9), donor_step(donor, 15), donor_step(donor, 99)) == (None, 10, 20)
    give_checkpoint(donor, 10, child)
    give_checkpoint(donor, 20, child)
    assert [step_of(path) for path in complete(child)] == [10]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("config.checkpoint_every=7", "give one that divides scheduler.perturb_steps"),
        ("repeat.top=1", "give repeat.top=0"),
        ("concurrent=1", "concurrent and budget.trials of 2 or more"),
        ("config.validate_every=20", "give 1 to 10"),
    ],
)
def test_what_a_population_cannot_have(wrong: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(wrong)
