"""Fine-tuning on a CUDA card: NCCL, bfloat16 and NF4. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


def test_qlora_trains_on_cards_in_bfloat16(tmp_path: Path, runs_root: Path, ray_session: None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import workloads.sft
    from workbench.config import load
    from workbench.runs import finish, open_run
    from workloads.chemistry import instruction_rows, load_molecules
    from workloads.tokenizer import train_tokenizer

    texts = [f"{row['instruction']}\n{row['input']}" for row in instruction_rows(load_molecules()[0][:200], seed=0)]
    tokenizer = train_tokenizer(texts, 500, 512)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    cards = torch.cuda.device_count()
    overrides = [
        f"base={tmp_path / 'base'}", f"workers={cards}", f"batch_size={8 * cards}", "gpus_per_worker=1",
        "steps=30", "warmup_steps=3", "learning_rate=0.01", "log_every=1", "validate_every=10",
    ]  # fmt: skip
    config = load(workloads.sft.SftConfig, None, overrides)
    assert config.compute_dtype == "bfloat16"
    with open_run("train", "sft", config) as run:
        summary = workloads.sft.run(config, run)
        finish(run, summary)
    assert summary["loss"] < 0.8 * 6.2  # ln 500: what guessing costs
    assert (run.folder / "artifacts" / "merged" / "model.safetensors").is_file()
