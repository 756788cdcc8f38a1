"""DeepSpeed's strategies on two gloo processes: what a rank stores, checkpoints that any strategy goes on from, steps
without a gradient, bfloat16. That their losses are those of one process is in ``test_loss_equality.py``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from loss_equality import SHARED, make_base, make_rows

RUNS = {
    "fsdp2": (2, None, ["strategy=fsdp2"]),
    "zero2": (2, None, ["strategy=zero2"]),
    "zero3 from zero2": (2, "zero2", ["strategy=zero3"]),
    "one from zero3": (1, "zero3 from zero2", []),
    "early": (
        2, None,
        [
            "strategy=zero3", "method=full", "quantization=none", "learning_rate=1", "divergence=null",
            "validate_every=1", "early_stopping.patience=1",
        ],
    ),
}  # fmt: skip
"""Name: processes, the run whose first checkpoint they go on from, overrides."""


def train_rank(rank: int, world: int, folder: Path, base: Path, overrides: list[str]) -> None:
    """QLoRA as ``rank`` of ``world`` in the run ``folder``."""
    import torch.distributed as dist

    from workbench.config import load
    from workloads.fine_tune import fine_tune
    from workloads.sft import SftConfig
    from workloads.training.ray_train import WorkerEvents

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    keys = [f"base={json.dumps(str(base))}", *SHARED, "steps=6", "checkpoint_every=3", *overrides]
    config = load(SftConfig, None, keys)
    rows = make_rows(base, 60)
    with WorkerEvents(folder, rank, config) as events:
        done = fine_tune(
            config, rows[:50], rows[50:], device=torch.device("cpu"), events=events, result=folder / "adapter",
            rank=rank,
        )  # fmt: skip
    told = {"train": done.history.train, "validation": done.history.validation, "stored": done.storage}
    told |= {"resumed_from": done.resumed_from, "trained": done.trained_parameters, "steps": done.history.step}
    (folder / f"done-{rank}.json").write_text(json.dumps(told))
    if world > 1:
        dist.destroy_process_group()


def step_rank(rank: int, folder: Path, stage: int) -> None:
    """A step in bfloat16, one whose gradient is no number, and what is left of the weights."""
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from workloads.training.fsdp import full_state
    from workloads.training.zero import ZeroOptimizer

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{stage}", rank=rank, world_size=2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = ZeroOptimizer(model, adam, stage=stage, clip=1.0, computed=torch.bfloat16)
    ids_BT = torch.arange(20)[None]
    states, norms = [full_state(model)], []
    for factor in (1.0, float("nan"), 1.0):
        loss = optimizer.engine(input_ids=ids_BT, labels=ids_BT).loss
        optimizer.backward(loss * factor, True)
        norms.append(float(optimizer.update()))
        states.append(full_state(model))
    if rank == 0:
        torch.save({"states": states, "norms": norms, "computed": loss.dtype}, folder / f"steps-{stage}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """All of it, in processes forked of one that has imported everything."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch.multiprocessing as processes

    import workloads.fine_tune  # noqa: F401

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    processes.start_processes(_base_in, (folder,), 1, start_method="fork")
    for name, (world, before, overrides) in RUNS.items():
        run = folder / name
        run.mkdir()
        if before is not None:
            first = "checkpoints/step-00000003"
            shutil.copytree(folder / before / first, run / first)
        given = (world, run, folder / "base", overrides)
        processes.start_processes(train_rank, given, world, start_method="fork")
    for stage in (2, 3):
        processes.start_processes(step_rank, (folder, stage), 2, start_method="fork")


def _base_in(_: int, folder: Path) -> None:
    make_base(folder / "base")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder


def told(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    done: dict[str, Any] = json.loads((runs / name / f"done-{rank}.json").read_text())
    return done


@pytest.mark.parametrize("name", [name for name, (_, before, _) in RUNS.items() if before])
def test_any_strategy_goes_on_from_a_checkpoint_of_any_other(runs: Path, name: str) -> None:
    whole, resumed = told(runs, "fsdp2"), told(runs, name)
    assert resumed["resumed_from"] == 3
    assert [step for step, _ in resumed["train"]] == list(range(1, 7))
    assert [loss for _, loss in resumed["train"]] == pytest.approx([loss for _, loss in whole["train"]], abs=1e-5)
    assert resumed["trained"] == whole["trained"]
    from safetensors.torch import load_file

    mine, its = (load_file(runs / run / "adapter" / "adapter_model.safetensors") for run in (name, "fsdp2"))
    assert mine.keys() == its.keys()
    for key, weight in its.items():
        torch.testing.assert_close(mine[key], weight, rtol=0, atol=1e-5)


def test_zero_3_stores_half_of_everything_and_zero_2_the_whole(runs: Path) -> None:
    for rank in (0, 1):
        shares, whole = told(runs, "zero3 from zero2", rank)["stored"], told(runs, "zero2", rank)["stored"]
        assert whole["local"] == whole["whole"] == shares["whole"]
        for part in ("", "_packed", "_scales"):
            assert shares[f"local{part}"] == pytest.approx(whole[f"whole{part}"] / 2, rel=0.02)
        assert whole["whole_packed"] > 0


def test_an_early_stop_ends_with_the_weights_of_the_lowest_loss(runs: Path) -> None:
    from safetensors.torch import load_file

    done = told(runs, "early")
    assert done["steps"] < 6
    best = min(done["validation"], key=lambda point: point[1])[0]
    saved = load_file(runs / "early" / "adapter" / "model.safetensors")
    assert best < done["steps"]
    kept = _weights_of(runs / "early" / "checkpoints" / f"step-{best:08}")
    assert kept.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(kept[name], weight, rtol=0, atol=0)


def _weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    sizes = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {key: torch.empty(at.size) for key, at in sizes.items() if key.startswith("model.")}
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    return {key.removeprefix("model."): weight for key, weight in state.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_without_a_finite_gradient_changes_no_weight(runs: Path, stage: int) -> None:
    seen = torch.load(runs / f"steps-{stage}.pt")
    new, one, two, three = (torch.cat([w.flatten() for w in state.values()]) for state in seen["states"])
    assert new.dtype == torch.float32 and not torch.equal(new, one)
    assert torch.equal(one, two) and not torch.equal(two, three)
    assert seen["norms"][0] > 0 and not seen["norms"][1] < float("inf") and seen["norms"][2] > 0


def test_bfloat16_updates_weights_that_are_kept_in_float32(runs: Path) -> None:
    """A thousandth of a weight is less than bfloat16 can add to it."""
    for stage in (2, 3):
        states = torch.load(runs / f"steps-{stage}.pt")["states"]
        changed = states[1]["model.norm.weight"] - states[0]["model.norm.weight"]
        assert changed.abs().max() == pytest.approx(1e-3, rel=0.05)


def test_without_deepspeed_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.errors import UserError
    from workloads.training.config import TrainingConfig
    from workloads.training.zero import check_installed

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_installed(TrainingConfig())
    with pytest.raises(UserError, match="give strategy=fsdp2, or on Linux install deepspeed=="):
        check_installed(TrainingConfig(strategy="zero2"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
