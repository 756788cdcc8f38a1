"""Every strategy on CUDA cards: NCCL, bfloat16, NF4 by the card's kernel. Skipped where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)

CARDS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loss_equality import make_base

    folder = tmp_path_factory.mktemp("strategies") / "base"
    make_base(folder, hidden=256)
    return folder


def curve(base: Path, strategy: str, *overrides: str) -> tuple[list[float], list[dict[str, Any]]]:
    """The losses of ten steps on all cards under Ray Train, and what each worker stored."""
    import workloads.sft
    from workbench.config import load
    from workbench.runs import finish, open_run
    from workbench.tracking import read_metrics

    data = base.parent / "rows.jsonl"
    rows = [{"instruction": f"{n} plus {n * n}", "input": "", "output": f"{n + n * n} " * 3} for n in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [
        f"base={base}", f"data={data}", f"strategy={strategy}", "gpus_per_worker=1", f"workers={CARDS}",
        f"batch_size={4 * CARDS}", "steps=10", "warmup_steps=2", "learning_rate=0.004", "log_every=1",
        "validate_every=5", "checkpoint_every=5", "max_length=64", "chat_template=plain", *overrides,
    ]  # fmt: skip
    config = load(workloads.sft.SftConfig, None, keys)
    with open_run("train", "sft", config) as run:
        finish(run, workloads.sft.run(config, run))
    return [row["loss"] for row in read_metrics(run.folder) if "loss" in row], read_metrics(run.folder)


@pytest.mark.parametrize("way", [[], ["quantization=none"], ["method=full", "quantization=none"]], ids=str)
@pytest.mark.parametrize("strategy", ["fsdp2-offload", "zero2", "zero3"])
def test_a_strategy_has_the_losses_of_fsdp2(
    strategy: str, way: list[str], base: Path, runs_root: Path, ray_session: None
) -> None:
    expected, _ = curve(base, "fsdp2", "dtype=float32", *way)
    found, _ = curve(base, strategy, "dtype=float32", *way)
    assert found == pytest.approx(expected, abs=1e-3)  # a card adds in another order


@pytest.mark.parametrize("strategy", ["fsdp2-offload", "zero2", "zero3"])
def test_a_strategy_trains_in_bfloat16(strategy: str, base: Path, runs_root: Path, ray_session: None) -> None:
    losses, _ = curve(base, strategy)
    assert losses[-1] < losses[0]


def test_offloading_leaves_less_on_the_card(base: Path, runs_root: Path, ray_session: None) -> None:
    way = ["method=full", "quantization=none", "learning_rate=1e-4"]
    peaks = []
    for strategy in ("fsdp2", "fsdp2-offload"):
        _, rows = curve(base, strategy, *way)
        peaks.append(max(row["peak_memory_gib/rank_0"] for row in rows if "peak_memory_gib/rank_0" in row))
    assert peaks[1] < peaks[0]
