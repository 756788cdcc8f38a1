"""A sweep on CUDA cards: energy, memory that runs out, and trials of several cards. Skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)

from sweeps import nothing_is_left, sweep, sweep_root, trials_of

pytestmark = pytest.mark.usefixtures("ray_session")

CARDS = torch.cuda.device_count()

ON_A_CARD = ["config.gpus_per_worker=1", "scheduler.kind=none", "config.quantization=none"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sweep_root(tmp_path_factory.mktemp("cards")) as folder:
        yield folder


def test_what_a_trial_took_from_its_card_is_counted(root: Path) -> None:
    folder, summary = sweep(root, "energy", "budget.trials=2", *ON_A_CARD)
    assert summary["finished"] == 2
    for trial in trials_of(folder):
        assert trial.attempts[-1]["card"] == torch.cuda.get_device_name(0)
        assert trial.gpu_seconds > 0
        assert trial.joules is not None and 1 < trial.joules / trial.seconds < 1500  # watts


def test_a_trial_that_no_card_holds_does_not_fit_and_the_others_go_on(root: Path) -> None:
    huge = "space={adapter.rank: {choice: [4, 50000000]}}"
    folder, summary = sweep(
        root, "memory", "budget.trials=2", "searcher=grid", huge, *ON_A_CARD
    )  # fmt: skip
    ended = {trial.point["adapter.rank"]: trial.state for trial in trials_of(folder)}
    assert ended == {4: "finished", 50000000: "does not fit"}
    assert summary["failed"] == 1


def test_trials_share_a_card_and_are_charged_for_their_part_of_it(root: Path) -> None:
    shared = ["config.resources={gpu: any, share: 0.5}", *ON_A_CARD[1:]]
    folder, summary = sweep(root, "share", "budget.trials=2", *shared)
    assert summary["finished"] == 2
    for trial in trials_of(folder):
        assert trial.attempts[-1]["card"] == torch.cuda.get_device_name(0)
        assert trial.gpu_seconds == pytest.approx(trial.seconds / 2)
        assert trial.joules is None  # nobody counts the part of a card


@pytest.mark.skipif(CARDS < 2, reason="one card")
def test_a_trial_of_several_cards_has_the_losses_of_one(root: Path) -> None:
    same = ["space={learning_rate: {choice: [0.003]}}", "budget.trials=1", "config.dtype=float32", *ON_A_CARD]
    alone, _ = sweep(root, "alone", *same)
    together, _ = sweep(root, "together", "config.workers=2", "config.strategy=fsdp2", *same)
    (one,), (two,) = trials_of(alone), trials_of(together)
    assert [value for _, value in two.curve] == pytest.approx([value for _, value in one.curve], abs=1e-3)
    assert two.joules is not None and two.gpu_seconds > two.seconds
    assert nothing_is_left()
