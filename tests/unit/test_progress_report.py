"""What a training run says of itself."""

import pytest

from workbench.runs import open_run
from workloads.progress_report import held_out_loss
from workloads.training.config import TrainingConfig

pytestmark = pytest.mark.usefixtures("runs_root")


def test_the_held_out_loss_is_that_of_the_weights_and_a_better_one_that_is_lost_is_named() -> None:
    done = {"best": (4, 1.0), "stopped_early": True}
    with open_run("train", "sft", TrainingConfig()) as run:
        assert held_out_loss(run, {**done, "result": (4, 1.0)}) == (4, 1.0)
        assert held_out_loss(run, {**done, "result": (8, 1.5), "stopped_early": False}) == (8, 1.5)
        assert run.report.sections == []
        assert held_out_loss(run, {**done, "result": (2, 1.25)}) == (2, 1.25)
    [told] = run.report.sections
    assert told["body"] == (
        "The result has the weights of step 2 (held-out loss 1.250): those of step 4 (1.000), the lowest, are in no "
        "checkpoint."
    )
