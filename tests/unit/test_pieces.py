"""A base that is loaded piece by piece has every byte of one that is loaded whole, and draws the same adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from workloads.training.adapters import add_adapter, load_base
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import decoder_layers
from workloads.training.pieces import Pieces

CPU = torch.device("cpu")


def make(family: str, folder: Path, stored: torch.dtype) -> str:
    """A base of three layers in two files."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    configs = {
        "llama": LlamaConfig(
            **sizes, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e3}
        ),
        "tied": LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**sizes),
        "qwen3": Qwen3Config(**sizes, head_dim=16),
        "moe": Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family]).to(stored)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size="100kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def everything(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("llama", "float32", "float32"),
        ("tied", "bfloat16", "float32"),
        ("qwen2", "float32", "bfloat16"),
        ("qwen3", "bfloat16", "bfloat16"),
    ],
)
def test_every_byte_is_that_of_a_base_that_is_loaded_whole(
    family: str, stored: str, dtype: str, quantization: Any, tmp_path: Path
) -> None:
    base = make(family, tmp_path, getattr(torch, stored))
    made = []
    for way in ("whole", "pieces"):
        pieces = None if way == "whole" else Pieces.of(base, dtype, quantization, CPU, "torch")
        model = load_base(base, dtype, quantization, CPU, kernel="torch") if pieces is None else pieces.model
        torch.manual_seed(7)
        model = add_adapter(model, AdapterConfig(rank=2))
        if pieces is not None:
            for part in (*decoder_layers(model), model):
                pieces.fill(part)
        made.append((model, torch.rand(1)))
    (whole, drawn), (filled, also) = made
    assert torch.equal(drawn, also)
    expected, found = everything(whole), everything(filled)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(found[name], tensor), name
    assert filled.generation_config.temperature == 0.5
    ids_BT = torch.arange(20)[None]
    assert torch.equal(filled(ids_BT).logits, whole(ids_BT).logits)


def test_one_layer_is_there_at_a_time(tmp_path: Path) -> None:
    pieces = Pieces.of(make("llama", tmp_path, torch.float32), "float32", "nf4", CPU, "torch")
    assert pieces is not None

    def held() -> int:
        return sum(
            {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in pieces.model.parameters()}.values()
        )

    before, layers = held(), decoder_layers(pieces.model)
    pieces.fill(layers[1])
    assert held() - before == pytest.approx(sum(p.nbytes for p in layers[1].parameters()), rel=0.02)


def test_a_base_whose_files_hold_other_tensors_is_loaded_whole(tmp_path: Path) -> None:
    base = make("moe", tmp_path, torch.float32)
    assert Pieces.of(base, "float32", "none", CPU, "torch") is None
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    assert Pieces.of(base, "float32", "none", CPU, "torch") is None
