"""A trial in its actor's process, without Ray around it: it ends where it reported, goes on, and makes room."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loss_equality import make_base, make_texts

from tune.config import SweepConfig
from tune.population import give_checkpoint
from tune.space import at_point
from tune.trial import ORDER, RESULT, TrialActor
from workbench.config import load
from workbench.errors import UserError
from workbench.tracking import read_metrics
from workloads.training.checkpoint import complete, step_of
from workloads.training.devices import CardTooSmall

STEPS = 12


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all trials of a sweep share: a tiny base, and rows in files."""
    folder = tmp_path_factory.mktemp("sweep")
    make_base(folder / "base")
    for part, count in (("train", 64), ("validation", 4)):
        lines = [
            json.dumps(
                {
                    "id": asked,
                    "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
                }
            )
            for asked, answer in make_texts(count)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    keys = ["steps=12", "batch_size=4", "max_length=64", "warmup_steps=2", "validate_every=4", "checkpoint_every=0",
            "keep_best=false", "adapter.rank=4", "log_every=2"]  # fmt: skip
    config = load(
        SweepConfig, None,
        [f"config.base={folder / 'base'}", f"config.data=[{folder / 'train.jsonl'}]",
         *(f"config.{key}" for key in keys), "space.learning_rate.choice=[0.001]"],
    )  # fmt: skip
    payload = {part: str(folder / f"{part}.jsonl") for part in ("train", "validation")}
    return {
        "workload": "train sft", "config": config.config, "payload": {**payload, "cache": str(folder / "cache")},
        "folder": str(folder / "trials"), "keep_checkpoints": False,
    }  # fmt: skip


def trial(number: int, rate: float = 0.003) -> dict[str, Any]:
    return {"number": number, "point": {"learning_rate": rate}, "environment": {}, "gpus": 0.0, "needed": 0}


def actor_of(shared: dict[str, Any], number: int) -> TrialActor:
    made = TrialActor.__new__(TrialActor)  # what Tune's own __init__ does needs a Ray node
    made.setup(trial(number), shared=shared)
    return made


def results(actor: TrialActor) -> Iterator[dict[str, Any]]:
    """What Tune would see: one result after the other, up to the last."""
    while True:
        result = actor.step()
        yield result
        if result.get("done"):
            return


def folder_of(shared: dict[str, Any], number: int) -> Path:
    return Path(shared["folder"]) / str(number)


def losses(shared: dict[str, Any], number: int) -> list[float]:
    return [row["loss"] for row in read_metrics(folder_of(shared, number)) if row.get("loss") is not None]


def test_a_trial_reports_its_looks_and_leaves_its_adapter(shared: dict[str, Any]) -> None:
    actor = actor_of(shared, 0)
    seen = list(results(actor))
    assert [result.get("step") for result in seen] == [4, 8, 12, None]
    assert all(result["setup"] > 0 and result["host"] for result in seen)
    assert (seen[-1]["outcome"], seen[-1]["facts"]["resumed_from"]) == ("finished", 0)
    assert (folder_of(shared, 0) / RESULT / "adapter_config.json").is_file()
    assert not (folder_of(shared, 0) / "checkpoints").exists()

    actor.reset_config(trial(1, rate=0.01))  # the same process has another trial
    assert list(results(actor))[-1]["outcome"] == "finished"
    assert losses(shared, 0) != losses(shared, 1)
    actor.reset_config(trial(6))
    assert list(results(actor))[-1]["outcome"] == "finished"
    assert losses(shared, 6) == losses(shared, 0)  # the base that was kept is as it was


def test_a_trial_that_is_told_to_end_writes_a_checkpoint_there_and_goes_on_as_if_nothing_was(
    shared: dict[str, Any],
) -> None:
    list(results(actor_of(shared, 2)))
    actor = actor_of(shared, 3)
    assert actor.step()["step"] == 4
    (folder_of(shared, 3) / ORDER).write_text("stopped early")
    assert actor.step()["outcome"] == "ended"
    assert [step_of(path) for path in complete(folder_of(shared, 3) / "checkpoints")] == [4]
    assert not (folder_of(shared, 3) / RESULT).exists()

    again = list(results(actor_of(shared, 3)))
    assert [result.get("step") for result in again] == [8, 12, None]
    assert again[-1]["facts"]["resumed_from"] == 4
    assert losses(shared, 3) == losses(shared, 2)


def test_a_trial_that_pauses_at_its_last_look_reports_it_again_and_finishes(shared: dict[str, Any]) -> None:
    actor = actor_of(shared, 9)
    for _ in range(3):
        last = actor.step()
    (folder_of(shared, 9) / ORDER).write_text("paused")
    assert actor.step()["outcome"] == "ended"
    look, end = results(actor_of(shared, 9))
    assert (look["step"], look["validation_loss"]) == (12, pytest.approx(last["validation_loss"]))
    assert end["outcome"] == "finished"
    assert (folder_of(shared, 9) / RESULT / "adapter_config.json").is_file()


def test_early_stopping_tells_the_look_at_the_weights_that_are_kept(shared: dict[str, Any]) -> None:
    rule = {"keep_best": True, "early_stopping": {"patience": 2}, "steps": 60, "warmup_steps": 0}
    actor = TrialActor.__new__(TrialActor)
    actor.setup(trial(10, rate=0.05), shared={**shared, "config": at_point(shared["config"], rule)})
    *looks, end = results(actor)
    best = min(looks, key=lambda look: look["validation_loss"])
    assert best["step"] < looks[-1]["step"] < 60
    kept = end["facts"]["kept"]
    assert (kept["step"], kept["validation_loss"]) == (best["step"], pytest.approx(best["validation_loss"]))


def test_a_copy_goes_on_from_anothers_checkpoint_with_values_of_its_own(shared: dict[str, Any]) -> None:
    actor = actor_of(shared, 7)
    assert actor.step()["step"] == 4
    (folder_of(shared, 7) / ORDER).write_text("stopped early")
    actor.step()
    give_checkpoint(folder_of(shared, 7) / "checkpoints", 4, folder_of(shared, 8) / "checkpoints")

    copy = TrialActor.__new__(TrialActor)
    other = {**trial(8), "point": {"learning_rate": 0.01, "weight_decay": 0.3}}
    copy.setup(other, shared={**shared, "keep_checkpoints": True})
    seen = list(results(copy))
    assert [result.get("step") for result in seen] == [8, 12, None]
    assert seen[-1]["facts"]["resumed_from"] == 4
    assert (folder_of(shared, 8) / "checkpoints").is_dir()
    rates = [row["learning_rate"] for row in read_metrics(folder_of(shared, 8)) if "learning_rate" in row]
    assert max(rates) > 0.003


def test_an_actor_that_must_go_waits_for_the_checkpoint(shared: dict[str, Any]) -> None:
    actor = actor_of(shared, 4)
    assert actor.step()["step"] == 4
    actor.cleanup()
    assert [step_of(path) for path in complete(folder_of(shared, 4) / "checkpoints")] == [4]


def test_what_goes_wrong_is_an_outcome_with_its_reason(shared: dict[str, Any]) -> None:
    broken = {**shared, "payload": {**shared["payload"], "train": "/nowhere.jsonl"}}
    (last,) = results(actor_of(broken, 5))
    assert last["outcome"] == "failed"
    assert "nowhere.jsonl" in last["reason"]
    assert "Traceback" in (folder_of(shared, 5) / "error.txt").read_text()


def test_a_mistake_is_a_failure_in_its_own_words_and_a_card_that_is_too_small_does_not_fit(
    shared: dict[str, Any],
) -> None:
    actor = actor_of(shared, 9)
    for error, outcome in ((UserError("too few rows"), "failed"), (CardTooSmall("too large"), "does not fit")):
        actor._failed(error)
        assert actor._results.get() == {"done": True, "outcome": outcome, "reason": str(error)}


def test_the_joules_of_a_group_are_not_told_before_its_other_ranks_have(shared: dict[str, Any]) -> None:
    pair = shared["config"].model_copy(update={"workers": 2})
    actor = actor_of({**shared, "config": pair}, 10)
    actor._meter = SimpleNamespace(joules=lambda: 3.0)
    assert actor._joules() is None
    actor._others = 4.0
    assert actor._joules() == 7
    alone = actor_of(shared, 11)
    alone._meter = actor._meter
    assert alone._joules() == 3
