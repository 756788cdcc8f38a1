"""A search space is checked against the workload's config before anything runs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.space import Range, at_point, check_space, draw_points
from tune.sweep import SweepConfig, TrialConfig
from workbench.config import load
from workbench.errors import UserError

BASE = TrialConfig(base="owner/model")


def test_a_point_sets_dotted_keys() -> None:
    point = at_point(BASE, {"learning_rate": 0.01, "adapter.rank": 4})
    assert (point.learning_rate, point.adapter.rank) == (0.01, 4)
    assert point.adapter.alpha == BASE.adapter.alpha


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no key 'adapter\.rnk'; did you mean 'adapter\.rank'"):
        check_space(BASE, {"adapter.rnk": Range(choice=[1])})


def test_a_value_that_the_workload_refuses_is_found_at_once() -> None:
    with pytest.raises(UserError, match=r"space\.adapter\.rank: 0 is refused"):
        check_space(BASE, {"adapter.rank": Range(choice=[8, 0])})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space.learning_rate.loguniform=[0.1, 0.01]"], "lower bound"),
        (["space.learning_rate.loguniform=[0, 1]"], "no place for 0"),
        (["space.learning_rate.loguniform=[0.1, 1]", "space.learning_rate.choice=[1]"], "exactly one"),
        (["space.learning_rate.choice=[0.1]", "config.validate_every=0"], "config.validate_every is 0"),
        (["space.learning_rate.choice=[0.1]", "config.learning_rat=1"], "did you mean 'config.learning_rate'"),
        (["space.learning_rate.choice=[0.1]", "config.workers=2", "config.batch_size=4"], "config.workers"),
    ],
)
def test_a_sweep_that_cannot_work_says_what_to_type(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(SweepConfig, None, ["config.base=owner/model", *overrides])


def test_the_demo_sweep_draws_learning_rate_and_rank() -> None:
    file = Path(__file__).parents[2] / "configs" / "demo" / "sweep.yaml"
    config = load(SweepConfig, file, visit_paths=False)
    assert set(config.space) == {"learning_rate", "adapter.rank"}
    assert config.trials == 4


@given(trials=st.integers(1, 12), seed=st.integers(0, 100))
def test_a_few_points_cover_every_key_evenly(trials: int, seed: int) -> None:
    space = {"rate": Range(loguniform=(0.001, 1.0)), "rank": Range(choice=[8, 16, 32]), "x": Range(uniform=(0, 1))}
    points = draw_points(space, trials, seed)
    assert points == draw_points(space, trials, seed)
    assert sorted(int(point["x"] * trials) for point in points) == list(range(trials))
    assert all(0.001 <= point["rate"] <= 1 for point in points)
    if trials >= 3:
        assert {point["rank"] for point in points} == {8, 16, 32}
