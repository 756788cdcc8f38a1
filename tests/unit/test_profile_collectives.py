"""What is said of ranks that do not answer."""

from typing import Any

import pytest
import ray

from profiling.collectives import ADVICE, ROOM, Group
from workbench.errors import Failure


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
