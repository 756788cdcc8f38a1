"""Going on with a run that was cut short: what may differ, what is taken over, what is said when training fails."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workbench.errors import UserError
from workbench.files import read_json, write_json
from workbench.runs import Run, finish, open_run
from workbench.tracking import WANDB_IDENTITY, Tracker, read_metrics
from workloads.training.checkpoint import Checkpoints, complete
from workloads.training.config import DivergenceConfig, TrainingConfig
from workloads.training.history import History
from workloads.training.resume import CHECKPOINTS, SAMPLES, adopt, check_resume, forget_after, what_is_left

pytestmark = pytest.mark.usefixtures("runs_root", "_without_wandb")


@pytest.fixture
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second or two of each run."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def config(**keys: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 20, "workers": 1, "strategy": "single", **keys})


def fill(run: Run, checkpoints: Sequence[tuple[int, float]], data: str = "rows") -> None:
    """Data as an input, metrics of 12 steps, samples, and a checkpoint for each (step, held-out loss)."""
    rows = run.artifact("train.jsonl")
    rows.write_text(data)
    run.input("train", path=rows)
    model = torch.nn.Linear(4, 4)
    keeper, history = Checkpoints(run.folder / CHECKPOINTS, keep_last=3), History()
    for step in range(1, 13):
        run.metrics(step, loss=1.0 / step)
    (run.folder / SAMPLES).write_text("".join(json.dumps({"step": step}) + "\n" for step in (4, 12)))
    for step, loss in checkpoints:
        history.step = step
        history.validation.append((step, loss))
        keeper.save(history, model, torch.optim.AdamW(model.parameters()), lambda folder: folder.mkdir())
    keeper.wait()


def cut_short(checkpoints: Sequence[tuple[int, float]] = ((4, 1.0), (6, 2.0), (8, 3.0)), **keys: Any) -> Path:
    with pytest.raises(KeyboardInterrupt), open_run("train", "sft", config(**keys)) as run:
        fill(run, checkpoints)
        raise KeyboardInterrupt
    return run.folder


def test_keys_that_say_how_it_runs_may_differ() -> None:
    folder = cut_short()
    check_resume(config(resume=str(folder), micro_batch_size=2, log_every=1, workers=2, strategy="fsdp2", keep_last=5))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.001, not 0.5"),
        ({"steps": 40, "seed": 1}, "steps was 20, not 40, seed was 0, not 1"),
        ({"dtype": "bfloat16"}, "dtype was float32, not bfloat16"),
    ],
)
def test_a_key_that_changes_what_is_learned_is_named(keys: dict[str, Any], named: str) -> None:
    folder = cut_short()
    with pytest.raises(UserError, match=f"was learning something else: {named}; give these keys as they were"):
        check_resume(config(resume=f"train-sft/{folder.name}", **keys))


def test_a_run_that_cannot_be_gone_on_with_is_refused() -> None:
    with pytest.raises(UserError, match="no run 'train-sft/nothing'"):
        check_resume(config(resume="train-sft/nothing"))
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        check_resume(config(resume=str(cut_short(checkpoints=()))))
    with open_run("train", "sft", config()) as run:
        with pytest.raises(UserError, match="is running: only a run that was cut short"):
            check_resume(config(resume=str(run.folder)))
        finish(run, {})
    with pytest.raises(UserError, match="is finished: only a run that was cut short"):
        check_resume(config(resume=str(run.folder)))


def test_the_newest_and_the_best_checkpoint_are_taken_over_with_every_step_once() -> None:
    folder = cut_short()
    write_json(folder / WANDB_IDENTITY, {"id": "1234abcd", "name": "first"})
    with open_run("train", "sft", config(resume=str(folder))) as run:
        run.input("train", path=folder / "artifacts" / "train.jsonl")
        assert adopt(str(folder), run, None) == 8
        assert [path.name for path in complete(run.folder / CHECKPOINTS)] == ["step-00000004", "step-00000008"]
        tracker = Tracker(run.folder, first_step=9)
        tracker.log(9, loss=0.0)
        tracker.close()
        assert read_json(run.folder / "inputs.json")["resume"]["step"] == 8
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, 10))
    assert (run.folder / SAMPLES).read_text() == '{"step": 4}\n'
    assert read_json(run.folder / WANDB_IDENTITY)["id"] == "1234abcd"
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 13))  # the old run is as it was
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 10))


def test_checkpoints_whose_loss_runs_away_are_passed_over() -> None:
    folder = cut_short(checkpoints=((4, 2.0), (6, 3.0), (8, 1.0)))
    for step, loss in ((4, 2.0), (6, 2.0), (8, 9.0)):
        history = folder / CHECKPOINTS / f"step-{step:08}" / "history.json"
        write_json(history, {**read_json(history), "recent": [2.0] * 5 + [loss]})
    rule = DivergenceConfig()
    with open_run("train", "sft", config(resume=str(folder))) as run:
        assert adopt(str(folder), run, rule) == 6
    assert [path.name for path in complete(run.folder / CHECKPOINTS)] == ["step-00000004", "step-00000006"]
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, 7))
    left = what_is_left(Run(folder, config(), "train sft"), before=9, rule=rule)
    assert f"the last good checkpoint is {folder / CHECKPOINTS / 'step-00000006'}" in left


def test_a_run_whose_every_checkpoint_runs_away_is_gone_on_with_only_without_the_rule() -> None:
    folder = cut_short(checkpoints=((8, 1.0),))
    history = folder / CHECKPOINTS / "step-00000008" / "history.json"
    write_json(history, {**read_json(history), "recent": [2.0] * 5 + [9.0]})
    with pytest.raises(UserError, match=r"no checkpoint from before its loss ran away: .* give divergence=null"):
        check_resume(config(resume=str(folder)))
    check_resume(config(resume=str(folder), divergence=None))


def test_other_data_is_refused() -> None:
    folder = cut_short()
    with open_run("train", "sft", config(resume=str(folder))) as run:
        rows = run.artifact("train.jsonl")
        rows.write_text("other rows")
        run.input("train", path=rows)
        with pytest.raises(UserError, match=r"the input 'train' of .* has changed since"):
            adopt(str(folder), run, None)


def test_a_last_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    forget_after(1, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2}\n'


def test_a_failure_says_what_is_left_and_what_to_type() -> None:
    with pytest.raises(KeyboardInterrupt), open_run("train", "sft", config()) as run:
        assert "there is no checkpoint" in what_is_left(run)
        fill(run, [(4, 1.0), (6, 2.0), (8, 3.0)])
        text = what_is_left(run)
        raise KeyboardInterrupt
    assert f"the last checkpoint is {run.folder / CHECKPOINTS / 'step-00000008'}" in text
    assert f"the best adapter so far (held-out loss 1.000) is {run.folder / CHECKPOINTS / 'step-00000004'}" in text
    command = shlex.split(text.partition("with: ")[2].partition(";")[0])
    assert command[:3] == ["workbench", "train", "sft"]
    assert Path(command[3]) == run.folder / "config.yaml"
    check_resume(config(resume=command[4].partition("=")[2]))
    assert "the last good checkpoint is" in what_is_left(run, before=8)
    assert "step-00000008" not in what_is_left(run, before=8)
