"""A search space is checked against the workload's config before anything runs."""

import random
from itertools import islice
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.config import SweepConfig
from tune.space import Range, Space, at_point, identity
from workbench.config import load
from workbench.errors import UserError
from workloads.sft import SftConfig

BASE = SftConfig(base="owner/model", workers=1, strategy="single")


def space(*constraints: str, **ranges: Range) -> Space:
    return Space(BASE, {key.replace("__", "."): values for key, values in ranges.items()}, constraints)


def test_a_point_sets_dotted_keys() -> None:
    point = at_point(BASE, {"learning_rate": 0.01, "adapter.rank": 4})
    assert (point.learning_rate, point.adapter.rank) == (0.01, 4)
    assert point.adapter.alpha == BASE.adapter.alpha


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no key 'adapter\.rnk'; did you mean 'adapter\.rank'"):
        space(adapter__rnk=Range(choice=[1])).check()


def test_a_value_that_the_workload_refuses_is_found_at_once() -> None:
    with pytest.raises(UserError, match=r"space\.adapter\.rank: 0 is refused"):
        space(adapter__rank=Range(choice=[8, 0])).check()


def test_a_value_that_is_taken_in_some_combination_is_good() -> None:
    both = {"method": Range(choice=["lora", "full"]), "quantization": Range(choice=["nf4", "none"])}
    made = space(**both)
    made.check()
    assert "4-bit weights cannot be trained" in made.why_not({"method": "full", "quantization": "nf4"})
    assert made.why_not({"method": "full", "quantization": "none"}) == ""


def test_a_space_whose_constraints_leave_nothing_is_empty() -> None:
    with pytest.raises(UserError, match=r"the space is empty.*breaks the constraint 'adapter.rank > 64'"):
        space("adapter.rank > 64", adapter__rank=Range(int=(1, 64))).check()


def test_a_constraint_rules_points_out() -> None:
    made = space("adapter.alpha == 2 * adapter.rank", adapter__rank=Range(choice=[8, 16]))
    assert made.why_not({"adapter.rank": 16}) == ""
    assert "breaks the constraint" in made.why_not({"adapter.rank": 8})


def test_a_branch_has_its_key_only_where_it_counts() -> None:
    made = space(
        adapter__rank=Range(choice=[8, 32]), adapter__dropout=Range(uniform=(0.1, 0.2), when="adapter.rank >= 16")
    )
    drawn = made.draw(20, random.Random(1))
    assert {point["adapter.rank"] for point in drawn} == {8, 32}
    assert all(("adapter.dropout" in point) == (point["adapter.rank"] == 32) for point in drawn)


def test_a_branch_looks_only_at_keys_before_it() -> None:
    late = {"adapter__dropout": Range(uniform=(0, 0.1), when="adapter.rank > 8"), "adapter__rank": Range(int=(1, 9))}
    with pytest.raises(UserError, match=r"'when' looks at adapter.rank: give that key before it"):
        space(**late).check()


def test_a_grid_has_every_allowed_point_once() -> None:
    made = space(
        "adapter.rank + max_length != 130",
        adapter__rank=Range(choice=[1, 2]),
        max_length=Range(choice=[64, 128], when="adapter.rank == 2"),
    )
    assert list(made.grid()) == [{"adapter.rank": 1}, {"adapter.rank": 2, "max_length": 64}]
    with pytest.raises(UserError, match="a grid needs values that can be counted"):
        list(space(learning_rate=Range(uniform=(0.1, 1))).grid())


def test_a_grid_over_a_wide_range_begins_at_once() -> None:
    made = space(seed=Range(int=(0, 10**15)), max_length=Range(choice=[64, 128]))
    assert list(islice(made.grid(), 3)) == [
        {"seed": 0, "max_length": 64}, {"seed": 0, "max_length": 128}, {"seed": 1, "max_length": 64},
    ]  # fmt: skip


def test_optuna_stores_and_gives_back_what_was_drawn() -> None:
    made = space(
        adapter__targets=Range(choice=["all-linear", ["q_proj", "v_proj"]]),
        learning_rate=Range(loguniform=(1e-4, 1e-2)),
        warmup_steps=Range(int=(1, 5)),
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in made.draw(6, random.Random(0)):
        study.enqueue_trial(made.encode(point))
        trial = study.ask()
        assert identity(made.suggest(trial)) == identity(point)
        assert identity(made.decode(trial.params)) == identity(point)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space.learning_rate.loguniform=[0.1, 0.01]"], "lower bound"),
        (["space.learning_rate.loguniform=[0, 1]"], "no place for 0"),
        (["space.learning_rate.loguniform=[0.1, 1]", "space.learning_rate.choice=[1]"], "exactly one"),
        (["space.learning_rate.choice=[0.1]", "config.validate_every=0"], "config.validate_every is 0"),
        (["space.learning_rate.choice=[0.1]", "config.learning_rat=1"], "did you mean 'config.learning_rate'"),
        (["space.learning_rate.choice=[0.1]", "space.strategy.choice=[fsdp2]"], "'strategy' says where a trial runs"),
        (["space.learning_rate.choice=[0.1]", "space.learning_rate.when=a >"], "is no condition"),
        (["space.learning_rate.choice=[0.1]", "constraints=['x[1]']"], "is nothing that a condition may have"),
        (["space.split_seed.choice=[1, 2]"], "'split_seed' is shared by all trials"),
        (["space.learning_rate.choice=[0.1]", "budget={}"], "a sweep has an end"),
        (["seed=1"], "the space is empty"),
    ],
)
def test_a_sweep_that_cannot_work_says_what_to_type(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(SweepConfig, None, ["config.base=owner/model", *overrides])


def test_the_schema_is_that_of_the_workload() -> None:
    dpo = ["workload=train dpo", "config.base=owner/model", "space.beta.choice=[0.1]", "config.data=[a.jsonl]"]
    assert load(SweepConfig, None, dpo, visit_paths=False).config.beta == 0.1  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"unknown key 'config.beta'"):
        load(SweepConfig, None, ["config.base=owner/model", "space.seed.choice=[1]", "config.beta=1"])


def test_the_demo_sweep_draws_learning_rate_and_rank() -> None:
    file = Path(__file__).parents[2] / "configs" / "demo" / "sweep.yaml"
    config = load(SweepConfig, file, visit_paths=False)
    assert set(config.space) == {"learning_rate", "adapter.rank"}
    assert config.budget.trials == 4


@given(trials=st.integers(1, 12), seed=st.integers(0, 100))
def test_a_few_points_cover_every_key_evenly(trials: int, seed: int) -> None:
    made = space(learning_rate=Range(loguniform=(0.001, 1.0)), adapter__rank=Range(choice=[8, 16, 32]),
                 weight_decay=Range(uniform=(0, 1)))  # fmt: skip
    points = made.draw(trials, random.Random(seed))
    assert points == made.draw(trials, random.Random(seed))
    assert sorted(int(point["weight_decay"] * trials) for point in points) == list(range(trials))
    assert all(0.001 <= point["learning_rate"] <= 1 for point in points)
    if trials >= 3:
        assert {point["adapter.rank"] for point in points} == {8, 16, 32}
