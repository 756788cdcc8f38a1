"""What can be trained is told from config.json: what an adapter is on, what is quantised, and why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.errors import UserError
from workloads.training.adapters import add_adapter, load_base, merge, save_adapter, target_names
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import full_state, sharded_bytes
from workloads.training.trainable import examine

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # fmt: skip
EXPERTS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]


def make(kind: str, folder: Path) -> str:
    """A tiny model with random weights: files at ``folder``."""
    import transformers as t

    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    elif kind == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4))
    elif kind == "qwen2_moe":
        sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2}
        model = t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**SIZES, **sizes, num_experts=4))
    elif kind == "qwen3_moe":
        config = t.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32)
        model = t.Qwen3MoeForCausalLM(config)
    elif kind == "olmoe":
        model = t.OlmoeForCausalLM(t.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, eos_token_id=1))
    else:
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2, eos_token_id=1))
    model.save_pretrained(folder)
    return str(folder)


def adapted_names(model: Any) -> set[str]:
    """The names of what the adapter is really on, as ``Coverage`` writes them."""
    names = {
        name.split(".lora_A")[0].rpartition("layers.")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    return {"experts" if "experts" in name and "shared" not in name else name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt2"])
def test_what_is_told_beforehand_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    base = make(kind, tmp_path)
    told = examine(base, "lora", "nf4", AdapterConfig(rank=4), "float32")
    model = load_base(base, "float32", "nf4", CPU)
    held = sharded_bytes(model)
    assert (told.total, told.packed) == (held["whole"], held["whole_packed"] + held["whole_scales"])
    model = add_adapter(model, AdapterConfig(rank=4))
    assert adapted_names(model) == set(told.adapted)
    assert sum(told.adapted.values()) * 2 == sum(p.requires_grad for p in model.parameters())
    ids_BT = torch.arange(1, 20)[None]
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_quantised_experts_have_the_logits_of_their_undone_weights(tmp_path: Path) -> None:
    base = make("mixtral", tmp_path)
    model = load_base(base, "float32", "nf4", CPU)
    plain = load_base(base, "float32", "nf4", CPU, unquantized=["experts.gate_up_proj", "experts.down_proj"])
    ids_BT = torch.arange(1, 20)[None]
    before = plain(ids_BT).logits
    for layer, undone in zip(plain.model.layers, model.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data = getattr(undone.mlp.experts, name)
    assert torch.equal(model(ids_BT).logits, plain(ids_BT).logits)
    assert not torch.equal(before, plain(ids_BT).logits)


def test_adapted_experts_stay_in_full_precision_and_say_so(tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=4, targets=EXPERTS)
    base = make("mixtral", tmp_path / "base")
    told = examine(base, "lora", "nf4", adapter, "bfloat16")
    assert told.adapted == {"q_proj": 2, "experts.gate_up_proj": 2, "experts.down_proj": 2}
    assert "experts stay in bfloat16: 0.4 MB of 0.4 MB" in told.text()
    assert "experts are in 4 bits" in examine(base, "lora", "nf4", AdapterConfig(), "bfloat16").text()


def test_adapted_experts_are_saved_and_merged(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    class NoTokenizer:
        def save_pretrained(self, folder: str) -> None: ...

    adapter = AdapterConfig(rank=4, targets=EXPERTS)
    base = make("mixtral", tmp_path / "base")
    model = add_adapter(load_base(base, "float32", "none", CPU, unquantized=target_names(adapter)), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, full_state(model), tmp_path / "adapter")
    ids_BT = torch.arange(1, 20)[None]
    logits = model(ids_BT).logits
    again = PeftModel.from_pretrained(load_base(base, "float32", "none", CPU), str(tmp_path / "adapter"))
    assert torch.equal(again(ids_BT).logits, logits)
    merge(base, tmp_path / "adapter", tmp_path / "merged", NoTokenizer(), "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids_BT).logits, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("llama", {"targets": ["q_prj"]}, "no layer 'q_prj'; did you mean q_proj"),
        ("llama", {"targets": ["self_attn"]}, "'self_attn' is no linear layer below the head: give some of down_proj"),
        ("llama", {"targets": ["lm_head"]}, "'lm_head' is no linear layer below the head"),
        ("llama", {"targets": "zzz"}, "no layer 'zzz'; it has down_proj, gate_proj"),
        ("mixtral", {"targets": ["w1"]}, "no layer 'w1'; it has experts.down_proj"),
        ("mixtral", {"targets": EXPERTS, "dropout": 0.1}, "give adapter.dropout=0"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(
    tmp_path: Path, kind: str, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        examine(make(kind, tmp_path), "lora", "nf4", AdapterConfig(**adapter), "float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"model_type": "vit"}, r"\(vit\) is no causal language model"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "holds a BertForMaskedLM, which does not predict",
        ),
        ({"model_type": "nothing"}, "Transformers cannot read"),
        (
            {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "stored quantised already",
        ),
        (
            {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "fp8"}},
            r"\(fp8\): give the model that it was made from",
        ),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        examine(str(tmp_path), "lora", "nf4", AdapterConfig(), "float32")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        examine(str(tmp_path), "lora", "nf4", AdapterConfig(), "float32")
