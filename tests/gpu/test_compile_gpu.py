"""Compiled layers and the chunked loss on a CUDA card. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


def test_compiled_qlora_has_the_loss_of_the_uncompiled(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM

    from workloads.training.adapters import add_adapter, load_base
    from workloads.training.batches import Row
    from workloads.training.compiling import prepare_layers
    from workloads.training.config import AdapterConfig, TrainingConfig
    from workloads.training.losses import summed_loss

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(tmp_path)
    cuda = torch.device("cuda")
    rows = [Row([*range(3, 3 + length)], [*range(3, 3 + length)]) for length in (200, 150)]
    losses = []
    for keys in ({}, {"compile": True, "gradient_checkpointing": True}):
        torch.manual_seed(0)
        model = add_adapter(load_base(str(tmp_path), "bfloat16", "nf4", cuda), AdapterConfig(rank=8))
        prepare_layers(model, TrainingConfig(**keys))
        loss = summed_loss(model, rows, cuda).objective
        loss.backward()
        losses.append(loss.item())
    assert not counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_allocator_sees_what_the_count_says() -> None:
    from benchmarks.loss_memory import counted, measured

    case = (32_768, torch.bfloat16, False)
    for chunk in (0, 512):
        assert measured(*case, chunk)[1] == pytest.approx(counted(*case, chunk), rel=0.1)
