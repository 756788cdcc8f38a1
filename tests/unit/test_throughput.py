"""Tokens per second, model FLOP utilisation and memory: what is counted."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from workloads.training.batches import IGNORE, Row
from workloads.training.throughput import Meter, attention_flops, head_flops, peak_flops, step_flops, weight_flops

CPU = torch.device("cpu")


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_weight_costs_six_operations_a_token_and_an_embedding_none(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    head = [model.lm_head.weight] if tied else []
    assert weight_flops(model) == 6 * sum(weight.numel() for weight in matrices + head)


def test_the_layers_of_gpt2_count_as_linear_ones() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from workloads.training.adapters import add_adapter
    from workloads.training.config import AdapterConfig

    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "wpe" not in name]
    numbers = sum(weight.numel() for weight in matrices)
    assert weight_flops(model) == 6 * numbers
    adapted = add_adapter(model, AdapterConfig(rank=2))
    lora = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert weight_flops(adapted) == 4 * numbers + 6 * lora


def test_a_frozen_weight_costs_four_and_its_adapter_six() -> None:
    from workloads.training.adapters import add_adapter
    from workloads.training.config import AdapterConfig

    model = llama()
    whole = weight_flops(model) / 6
    adapted = add_adapter(model, AdapterConfig(rank=2))
    lora = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert weight_flops(adapted) == 4 * whole + 6 * lora


def test_packed_weights_count_as_the_weights_that_they_hold(tmp_path: Path) -> None:
    from workloads.training.adapters import load_base

    llama().save_pretrained(tmp_path)
    whole, packed = (load_base(str(tmp_path), "float32", kind, CPU) for kind in ("none", "nf4"))
    for model in (whole, packed):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    assert sum(weight.nbytes for weight in packed.parameters()) < 0.5 * sum(w.nbytes for w in whole.parameters())
    assert weight_flops(packed) == weight_flops(whole)


def test_a_partitioned_stack_counts_by_its_whole_shape() -> None:
    model = llama()
    before = weight_flops(model)
    stack = torch.nn.Parameter(torch.empty(0))
    stack.ds_shape = torch.Size([4, 8, 8])  # type: ignore[attr-defined]
    model.register_parameter("stack", stack)
    assert weight_flops(model) == before + 6 * 4 * 8 * 8


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_only_the_experts_that_a_token_visits_count(tmp_path: Path, kind: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from workloads.training.adapters import load_base

    def flops(experts: int) -> float:
        sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=experts)
        MixtralForCausalLM(config).save_pretrained(tmp_path / str(experts))
        model = load_base(str(tmp_path / str(experts)), "float32", kind, CPU)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return weight_flops(model)

    assert flops(4) > 4 * 2 * 3 * 64 * 128  # two experts of three matrices
    assert 0 <= flops(8) - flops(4) <= 4 * 4 * 64  # four more rows of the router, which some versions hold as a tensor


def test_attention_costs_twelve_times_layers_times_width_for_each_token_of_the_sequence() -> None:
    assert attention_flops(llama()) == 12 * 3 * 64


def test_a_step_costs_the_head_where_a_token_is_learned_and_attention_within_each_example() -> None:
    model = llama()
    head = head_flops(model)
    assert head == 6 * model.config.vocab_size * model.config.hidden_size
    row = Row([1] * 10, [IGNORE] * 6 + [1] * 4, starts=(0, 6))
    costs = weight_flops(model), attention_flops(model), head
    assert step_flops([row, row], *costs) == 2 * (10 * (costs[0] - head) + 4 * head + (36 + 16) * costs[1])


def test_tokens_are_counted_without_padding_and_time_aside_does_not_count() -> None:
    meter = Meter(llama(), CPU, "float32")
    begun = time.perf_counter()
    with meter.aside():
        time.sleep(0.2)
    meter.add([Row([1] * 30, [1] * 30), Row([1] * 10, [1] * 10)])
    values = meter.read()
    assert values["tokens_per_second"] > 40 / (time.perf_counter() - begun)
    assert values["peak_memory_gib/rank_0"] > 0.05
    assert "model_flop_utilisation" not in values


def test_a_card_that_is_not_known_and_a_cpu_have_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, "bfloat16") is None
    names = {"NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504e12, "NVIDIA H200": 989e12, "Some Card": None}
    names |= {"NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 439e12, "NVIDIA GeForce RTX 5060 Ti": 47.4e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), "bfloat16") == peak
        assert peak_flops(torch.device("cuda"), "float32") is None
