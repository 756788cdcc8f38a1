"""Training that went wrong is stopped at the step where it did, and says what that step had read."""

import math
import pickle
from typing import Any

import pytest
import torch

from workloads.training.batches import Batches, Row
from workloads.training.config import DivergenceConfig
from workloads.training.divergence import Diverged, LossWatch
from workloads.training.history import History

RULE = DivergenceConfig(factor=3, steps=3, window=20)


def watch(history: History, rule: DivergenceConfig | None = RULE, device: str = "cpu") -> LossWatch:
    rows = [Row([1, 2], [1, 2], sources=(f"a.jsonl:{index}",)) for index in range(40)]
    return LossWatch(history, rule, Batches(rows, 2, seed=0), torch.device(device), remember=5)


def feed(losses: list[float], **given: Any) -> History:
    history = History()
    watcher = watch(history, **given)
    for step, loss in enumerate(losses, 1):
        watcher.add(step, torch.tensor(loss), torch.tensor(1.0))
    watcher.look()
    return history


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_step_and_its_documents(bad: float) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step 4; .*lower learning_rate") as error:
        feed([2.0, 2.0, 2.0, bad])
    rows = Batches([Row([1], [1], sources=(f"a.jsonl:{index}",)) for index in range(40)], 2, seed=0)[3]
    assert error.value.since == 4
    assert error.value.sources == tuple(row.sources[0] for row in rows)
    assert all(source in str(error.value) for source in error.value.sources)


def test_a_gradient_that_is_no_number_is_found_too() -> None:
    with pytest.raises(Diverged, match="the gradient's norm is nan at step 1"):
        watch(History()).add(1, torch.tensor(2.0), torch.tensor(math.nan))


def test_a_card_is_asked_only_when_somebody_looks_and_the_step_is_still_named() -> None:
    watcher = watch(History(), device="meta")  # any device that is not the CPU
    for step in range(1, 6):
        watcher.add(step, torch.tensor(math.nan if step == 3 else 2.0), torch.tensor(1.0))
    with pytest.raises(Diverged, match="at step 3"):
        watcher.look()


def test_a_loss_far_over_the_usual_for_some_steps_is_a_divergence() -> None:
    with pytest.raises(Diverged, match="over 3 times its usual 2 since step 11") as error:
        feed([2.0] * 10 + [7.0, 8.0, 9.0])
    assert error.value.since == 11


@pytest.mark.parametrize(
    "losses", [[2.0] * 10 + [7, 8, 5, 9, 9, 2], [10.0, 1, 1, 1, 1, 1], [2.0] * 10 + [5] * 20, [0.01] * 10 + [0.2] * 9]
)
def test_spikes_a_fall_a_bad_stretch_and_noise_are_none(losses: list[float]) -> None:
    feed(losses)


def test_without_the_rule_only_numbers_that_are_none_stop_it() -> None:
    assert feed([2.0] * 10 + [70.0] * 10, rule=None).recent == [70.0] * 5


def test_it_reaches_the_driver_whole() -> None:
    error = Diverged("the loss is nan at step 3", 3, ("a:1",))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
