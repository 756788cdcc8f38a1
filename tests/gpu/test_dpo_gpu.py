"""Preference tuning on CUDA cards: NCCL, bfloat16 and NF4, the reference by the same sharded model. Skipped without."""

import json
import math
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


def test_preferences_are_learned_on_cards_in_bfloat16(tmp_path: Path, runs_root: Path, ray_session: None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import workloads.dpo
    from workbench.config import load
    from workbench.runs import finish, open_run
    from workbench.tracking import read_metrics
    from workloads.tokenizer import train_tokenizer

    rows = [{"prompt": f"Is {n} even?", "chosen": "yes" * (1 + n % 2), "rejected": "no"} for n in range(200)]
    tokenizer = train_tokenizer([json.dumps(row) for row in rows], 330, 512)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cards = torch.cuda.device_count()
    overrides = [
        f"base={tmp_path / 'base'}", f"data={tmp_path / 'pairs.jsonl'}", f"workers={cards}", f"batch_size={4 * cards}",
        "gpus_per_worker=1", "steps=30", "warmup_steps=3", "learning_rate=0.005", "log_every=1", "validate_every=10",
        "gradient_checkpointing=true", "max_length=64",
    ]  # fmt: skip
    config = load(workloads.dpo.DpoConfig, None, overrides)
    assert config.compute_dtype == "bfloat16"
    with open_run("train", "dpo", config) as run:
        summary = workloads.dpo.run(config, run)
        finish(run, summary)
    assert read_metrics(run.folder)[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert summary["validation_accuracy"] > 0.9
