"""The plan of a run's memory against what PyTorch's allocator handed out on a card."""

from pathlib import Path

import pytest
import torch

from workloads.training.adapters import add_adapter, load_base, trainable_parameters
from workloads.training.chunked_loss import cross_entropy, loss_of
from workloads.training.compiling import prepare_layers
from workloads.training.config import AdapterConfig, TrainingConfig
from workloads.training.memory_plan import plan_memory
from workloads.training.step_trace import Step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_plan_is_within_a_tenth_of_what_a_card_hands_out(quantized: bool, recomputed: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    adapter, device = (AdapterConfig() if quantized else None), torch.device("cuda", 0)
    step = Step(rows=4, length=1024, adapter=adapter, quantized=quantized, checkpointing=recomputed)
    plan = plan_memory(lambda: AutoModelForCausalLM.from_config(shape), step, ranks=1, micro_batches=1)

    model = load_base(str(tmp_path), "bfloat16", "nf4" if quantized else "none", device)
    model = model if adapter is None else add_adapter(model, adapter)
    prepare_layers(model, TrainingConfig(gradient_checkpointing=recomputed))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-4)
    torch.cuda.reset_peak_memory_stats(device)
    ids_BT = torch.full((4, 1024), 5, device=device)
    for _ in range(2):
        loss_of(model, {"input_ids": ids_BT}, ids_BT, cross_entropy, step.loss_chunk).objective.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert plan.peak == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.1)
