"""Where ranks go, how long a collective may take, and what is said of those that do not answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.nodes import Node
from profiling.collectives import ADVICE, ROOM, CollectivesConfig, Group, placements
from workbench.errors import Failure, UserError


@pytest.mark.parametrize("advice, words", [(ADVICE, "NCCL_P2P_DISABLE"), (ROOM, "cluster status")])
def test_a_rank_that_has_no_room_yet_is_not_taken_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, advice: str, words: str
) -> None:
    def wait(asked: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return asked[:1], asked[1:]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda one: one)
    group = Group.__new__(Group)
    group._timeout = 1.0
    with pytest.raises(Failure, match="rank 1 has not answered for 1 s") as failed:
        group._ask("start", ["a", "b"], advice)
    assert words in str(failed.value)


def test_a_host_that_cannot_hold_its_ranks_is_refused() -> None:
    nodes = [Node("small", total={"CPU": 2.0}), Node("large", total={"CPU": 8.0})]

    def hosts(ranks: int) -> list[str]:
        return [one.host for one in placements(CollectivesConfig(hosts=["small", "large"], workers=ranks), nodes)]

    assert hosts(4) == ["small", "large", "small", "large"]
    with pytest.raises(UserError, match="3 workers of 1 CPU on small"):
        hosts(5)


def test_the_time_of_a_round_is_that_of_its_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of 3 s each are slow and well within a timeout of 4 s, however many are in a round."""
    took = {"prepare": 0.0, "check": 3.0, "measure": 3.0}

    def method(name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: (name, given[0] if name == "measure" else 1))

    def wait(asked: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        late = [one for one in asked if took[one[0]] * one[1] > timeout]
        return [one for one in asked if one not in late], late

    monkeypatch.setattr(ray, "wait", wait)
    answers = {"prepare": 64, "check": 1, "measure": 3.0}
    monkeypatch.setattr(ray, "get", lambda one: [ray.get(x) for x in one] if isinstance(one, list) else answers[one[0]])
    group = Group.__new__(Group)
    group._config = CollectivesConfig(timeout=4, rounds=3, repeats=5)
    group._timeout = 4.0
    group._ranks = [SimpleNamespace(**{name: method(name) for name in took})] * 2
    assert group.measure("all-reduce", 64) == [{"bytes": 64, "seconds": [3.0] * 3, "wrong": 2}] * 2
    took["measure"] = 5.0
    with pytest.raises(Failure, match="hangs"):
        group.measure("all-reduce", 64)


@pytest.mark.parametrize("said, told", [("", "ValueError"), ("first\nlast", "ValueError: last")])
def test_a_rank_that_fails_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch, said: str, told: str) -> None:
    def get(one: Any) -> None:
        raise ray.exceptions.RayTaskError("measure", "", ValueError(said))

    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(ray, "get", get)
    group = Group.__new__(Group)
    group._timeout = 1.0
    with pytest.raises(Failure, match=f"rank 0 failed: {told};"):
        group._ask("start", ["a"])
