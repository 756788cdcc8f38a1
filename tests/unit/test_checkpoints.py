"""Checkpoints: whole or absent, written while training goes on, kept by rule, resumed as if nothing had happened."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_of_at_most

from workloads.training.batches import IGNORE, Batches, Row
from workloads.training.checkpoint import Checkpoints, best_of, complete, history_of, read_failures
from workloads.training.config import EarlyStoppingConfig, TrainingConfig
from workloads.training.history import History
from workloads.training.loop import train

GIVEN = {"steps": 12, "batch_size": 6, "warmup_steps": 2, "log_every": 4, "workers": 1, "strategy": "single"}


def make_model(dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=dropout))


def make_rows(count: int) -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 50, (5 + index % 7,), generator=draw).tolist() for index in range(count)]
    return [Row(each, [IGNORE] * 3 + each[3:]) for each in ids]


class Keeping:
    """Events that keep rows of metrics and write checkpoints."""

    def __init__(self, folder: Path, keep_last: int = 10) -> None:
        self.checkpoints = Checkpoints(folder, keep_last)
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, **values: float) -> None:
        self.rows[step] = values

    def checkpoint(self, history: History, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.checkpoints.save(history, model, optimizer)


def run(
    folder: Path,
    *,
    resume: bool = False,
    keep_last: int = 10,
    dropout: float = 0.0,
    held_out: int = 0,
    **keys: Any,
) -> tuple[Keeping, History, Any]:
    """Train on 15 rows, an epoch of two batches and a half; from the last checkpoint in ``folder`` with ``resume``."""
    config = TrainingConfig(**{**GIVEN, "validate_every": 0, **keys})
    model, rows = make_model(dropout), make_rows(15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    events = Keeping(folder, keep_last)
    history = events.checkpoints.load(model, optimizer) if resume else None
    validation = make_rows(15 + held_out)[15:]
    batches = Batches(rows, config.batch_size, config.seed)
    history = train(model, batches, config, validation=validation, events=events, optimizer=optimizer, history=history)
    events.checkpoints.wait()
    return events, history, model


def steps(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in complete(folder)]


def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(tmp_path: Path) -> None:
    _, history, model = run(tmp_path / "whole", checkpoint_every=5, dropout=0.1)
    run(tmp_path / "cut", checkpoint_every=5, dropout=0.1, keep_last=1)  # 5 and 10 lie within an epoch and a log row
    assert steps(tmp_path / "cut") == [10]
    events, again, resumed = run(tmp_path / "cut", checkpoint_every=5, dropout=0.1, resume=True)
    assert again.train == history.train
    assert list(events.rows) == [12]
    for mine, its in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_checkpoint_is_what_the_weights_were_when_it_was_begun(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [weight.clone() for weight in model.parameters()]
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(History(step=3), model, optimizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    checkpoints.wait()
    assert checkpoints.load(model, optimizer) == History(step=3)
    for weight, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, was)


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(History(step=1), model, optimizer)
    checkpoints.wait()
    going_on = threading.Event()
    seen: list[list[int]] = []

    def slow_export(folder: Path) -> None:
        going_on.wait()
        folder.mkdir()

    checkpoints.save(History(step=2), model, optimizer, slow_export)  # returns while it is being written
    seen.append(steps(tmp_path))
    going_on.set()
    checkpoints.wait()
    assert [*seen, steps(tmp_path)] == [[1], [2]]
    assert (tmp_path / "step-00000002" / "adapter").is_dir()


def test_the_half_of_a_checkpoint_that_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    Checkpoints(tmp_path, keep_last=1)
    assert not list(tmp_path.iterdir())


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    history = History()
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 1.5], 1):
        history.step = step
        history.validation.append((step, loss))
        checkpoints.save(history, model, optimizer)
    checkpoints.wait()
    assert steps(tmp_path) == [2, 4, 5]
    best = best_of(complete(tmp_path))
    assert best is not None
    assert history_of(best).best == (2, 1.0)


def full_disk(folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_the_best_that_could_be_written_is_kept_and_loaded_with_a_word_which_it_is(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.load_best(model) is None
    history = History()
    for step, loss in enumerate([3.0, 2.0, 1.0, 2.5, 2.7], 1):
        history.step = step
        history.validation.append((step, loss))
        with torch.no_grad():
            model.lm_head.weight.fill_(loss)
        checkpoints.save(history, model, optimizer, full_disk if step == 3 else None)
    checkpoints.wait()
    assert steps(tmp_path) == [2, 5]
    assert checkpoints.load_best(model) == (2, 2.0)
    assert model.lm_head.weight.unique().tolist() == [2.0]


def test_one_from_before_the_steps_in_doubt_is_kept(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=2, in_doubt=4)
    kept = []
    for step in range(1, 9):
        checkpoints.save(History(step=step), model, optimizer)
        checkpoints.wait()
        kept.append(steps(tmp_path))
    assert kept[-4:] == [[1, 3, 4, 5], [1, 3, 5, 6], [3, 5, 6, 7], [3, 5, 7, 8]]


def test_training_ends_when_the_held_out_loss_stops_falling_and_has_the_best_weights(tmp_path: Path) -> None:
    rule = EarlyStoppingConfig(patience=2)
    events, history, model = run(
        tmp_path, steps=200, learning_rate=0.05, held_out=5, validate_every=2, keep_last=1, early_stopping=rule
    )
    assert history.stopped_early
    assert history.best is not None
    losses = dict(history.validation)
    assert [step for step in losses if step > history.best[0]] == [history.step - 2, history.step]
    from workloads.training.loop import held_out_means

    events.checkpoints.load_best(model)
    again = held_out_means(model, make_rows(20)[15:], 6, torch.device("cpu"))["loss"]
    assert again == pytest.approx(history.best[1], abs=1e-6)
    assert again < losses[history.step]


@pytest.mark.parametrize(("losses", "over"), [([3, 2, 2, 2], True), ([3, 2, 2], False), ([3, 2, 1.95, 1.91], True)])
def test_patience_counts_looks_without_an_improvement_by_min_delta(losses: list[float], over: bool) -> None:
    history = History(validation=list(enumerate(losses)))
    assert history.is_out_of_patience(EarlyStoppingConfig(patience=2, min_delta=0.1)) is over


def test_where_a_checkpoint_cannot_be_written_the_last_one_stays_and_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, steps=6, checkpoint_every=4)
    with files_of_at_most(10_000):
        _, history, _ = run(tmp_path, checkpoint_every=4, resume=True)
    assert history.step == 12
    assert steps(tmp_path) == [4]
    assert not list(tmp_path.glob(".*"))
    (failure,) = read_failures(tmp_path)
    assert failure["step"] == 8
    assert "File too large" in failure["cause"] or "write failed" in failure["cause"]
    assert "the checkpoint of step 8 could not be written" in capfd.readouterr().err
