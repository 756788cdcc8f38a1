"""A base whose NF4 weights are undone computes as the packed one, for every way in which weights are stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from workloads.training.adapters import add_adapter, load_base, save_adapter
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import full_state
from workloads.training.whole import CPU, undone_base, with_adapter

IDS_BT = torch.arange(1, 20)[None]
SIZES = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # fmt: skip


def made(kind: str, folder: Path) -> str:
    """A tiny model with random weights: files at ``folder``."""
    import transformers as t

    torch.manual_seed(0)
    model: Any
    if kind == "qwen2":  # with biases
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES))
    elif kind == "mixtral":  # with stacks of experts
        model = t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4))
    else:  # with the transposed layers of GPT-2
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2, eos_token_id=1))
    model.save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(IDS_BT).logits
    return out


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "gpt2"])
def test_the_undone_base_has_the_logits_of_the_packed_one(kind: str, tmp_path: Path) -> None:
    base = made(kind, tmp_path / "base")
    packed, undone = load_base(base, "float32", "nf4", CPU), undone_base(base, "float32", "float32")
    assert torch.allclose(logits(undone), logits(packed), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(undone), logits(load_base(base, "float32", "none", CPU)), atol=1e-3)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_the_adapter_is_added_to_it(kind: str, tmp_path: Path) -> None:
    base = made(kind, tmp_path / "base")
    tuned = add_adapter(load_base(base, "float32", "nf4", CPU), AdapterConfig(rank=4))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(tuned, full_state(tuned), tmp_path / "adapter")
    merged = with_adapter(undone_base(base, "float32", "float32"), tmp_path / "adapter")
    assert torch.allclose(logits(merged), logits(tuned), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(merged), logits(undone_base(base, "float32", "float32")), atol=1e-2)


def test_in_sixteen_bits_they_are_the_numbers_that_training_computes_with(tmp_path: Path) -> None:
    base = made("qwen2", tmp_path / "base")
    packed, undone = load_base(base, "bfloat16", "nf4", CPU), undone_base(base, "bfloat16", "bfloat16")
    assert torch.equal(logits(undone), logits(packed))
