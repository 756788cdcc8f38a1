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
    from workbench.tracking import read_metrics
    from workloads.chemistry import instruction_rows, load_molecules
    from workloads.tokenizer import train_tokenizer
    from workloads.training.checkpoint import complete
    from workloads.training.throughput import peak_flops

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
        "steps=30", "warmup_steps=3", "learning_rate=0.01", "log_every=5", "validate_every=10", "sample_every=15",
    ]  # fmt: skip
    config = load(workloads.sft.SftConfig, None, overrides)
    assert config.compute_dtype == "bfloat16"
    with open_run("train", "sft", config) as run:
        summary = workloads.sft.run(config, run)
        finish(run, summary)
    assert summary["loss"] < 0.8 * 6.2  # ln 500: what guessing costs
    assert (run.folder / "artifacts" / "merged" / "model.safetensors").is_file()
    assert complete(run.folder / "checkpoints")
    last = read_metrics(run.folder)[-1]
    assert all(0 < last[f"peak_memory_gib/rank_{rank}"] < 4 for rank in range(cards))
    if all(peak_flops(torch.device("cuda", card), "bfloat16") for card in range(cards)):
        assert 0 < last["model_flop_utilisation"] < 1


def test_a_loss_that_is_no_number_is_found_on_a_card_between_two_looks() -> None:
    from workloads.training.batches import Batches, Row
    from workloads.training.divergence import Diverged, LossWatch
    from workloads.training.history import History

    cuda = torch.device("cuda")
    batches = Batches([Row([1, 2], [1, 2], sources=(f"a:{index}",)) for index in range(20)], 2, seed=0)
    watch = LossWatch(History(), None, batches, cuda, remember=10)
    for step in range(1, 8):
        loss = torch.tensor([float("nan") if step == 4 else 2.0], device=cuda)
        watch.add(step, loss, torch.tensor(1.0, device=cuda))
    with pytest.raises(Diverged, match="at step 4"):
        watch.look()
