"""The losses of TRL's SFTTrainer: the same model, rows, order, optimizer and schedule give the same curve.

TRL gets the rows as tokens and labels, in the order in which ``Batches`` deals them: both learn the same answers.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loss_equality import SHARED, STEPS, WAYS, Silent, make_base, make_rows

from workloads.training.batches import Row

pytest.importorskip("trl", reason="TRL is not installed: ./install.sh dev")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "base"
    make_base(folder)
    return folder


def configured(base: Path, way: str) -> Any:
    from workbench.config import load
    from workloads.sft import SftConfig

    return load(SftConfig, None, [f"base={base}", *SHARED, *WAYS[way], "workers=1"])


def losses_of_ours(config: Any, rows: Sequence[Row], result: Path) -> list[float]:
    import torch

    from workloads.fine_tune import fine_tune

    done = fine_tune(config, rows, [], device=torch.device("cpu"), events=Silent(), result=result)
    return [loss for _, loss in done.history.train]


def losses_of_trl(config: Any, base: Path, rows: Sequence[Row], folder: Path) -> list[float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from workloads.prepared import batches_of
    from workloads.training.adapters import ALL_LINEAR
    from workloads.training.loop import learning_rate

    batches = batches_of(rows, config)
    dealt = [row for step in range(config.steps) for row in batches[step]]
    columns = {"input_ids": [row.ids for row in dealt], "labels": [row.labels for row in dealt]}
    if config.packing:
        edges = [(*row.starts, len(row.ids)) for row in dealt]
        columns["seq_lengths"] = [[end - start for start, end in pairwise(each)] for each in edges]
    adapter = LoraConfig(
        r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
    )
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=config.steps, per_device_train_batch_size=config.batch_size, seed=config.seed,
        max_grad_norm=config.gradient_clip, train_sampling_strategy="sequential", logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, padding_free=config.packing,
        dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(base), peft_config=adapter if config.method == "lora" else None,
    )  # fmt: skip
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: learning_rate(config, step) / config.learning_rate
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("way", ["full", "lora", "lora, packed"])
def test_trl_has_the_same_losses(base: Path, way: str, tmp_path: Path) -> None:
    config, rows = configured(base, way), make_rows(base, 50)
    ours, trl = losses_of_ours(config, rows, tmp_path / "ours"), losses_of_trl(config, base, rows, tmp_path / "trl")
    assert len(trl) == STEPS
    assert ours == pytest.approx(trl, abs=1e-4)  # 1.5e-6 was seen
    assert ours[-1] < 0.9 * ours[0]
