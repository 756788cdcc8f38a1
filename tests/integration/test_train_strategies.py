"""``train sft`` under Ray Train by each strategy: the losses of FSDP2, with samples, adapters and a merged model."""

import json
from pathlib import Path

import pytest
from loss_equality import make_base

import workloads.sft
from workbench.config import load
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600), pytest.mark.soak]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_base(folder / "base")
    rows = [{"instruction": f"{n} plus {n * n}", "input": "", "output": f"{n + n * n} " * 3} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base"


def trained(base: Path, strategy: str) -> list[float]:
    """The losses, held-out ones included, of a run whose artifacts are whole."""
    given = [
        f"base={json.dumps(str(base))}", f"data={json.dumps(str(base.parent / 'rows.jsonl'))}", f"strategy={strategy}",
        "steps=6", "batch_size=4", "warmup_steps=1", "learning_rate=0.004", "max_length=64", "log_every=1",
        "validate_every=3", "checkpoint_every=3", "sample_every=3", "sample_prompts=1", "sample_tokens=2",
        "cpus_per_worker=0.5", "adapter.rank=4", "chat_template=plain",
    ]  # fmt: skip
    config = load(workloads.sft.SftConfig, None, given)
    with open_run("train", "sft", config) as run:
        summary = workloads.sft.run(config, run)
        finish(run, summary)
    assert (run.folder / "checkpoints" / "step-00000003" / "adapter" / "adapter_config.json").is_file()
    assert (run.folder / "artifacts" / "merged" / "model.safetensors").is_file()
    assert len((run.folder / "artifacts" / "samples.jsonl").read_text().splitlines()) == 2
    rows = read_metrics(run.folder)
    return [row[key] for key in ("loss", "validation_loss") for row in rows if key in row]


def test_every_strategy_has_the_losses_of_fsdp2(base: Path, runs_root: Path) -> None:
    expected = trained(base, "fsdp2")
    assert len(expected) == 8
    for strategy in ("fsdp2-offload", "zero2", "zero3"):
        assert trained(base, strategy) == pytest.approx(expected, abs=1e-5), strategy
