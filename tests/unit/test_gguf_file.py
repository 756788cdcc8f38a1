"""One GGUF file: the same logits and tokens when Transformers reads it back, and refusals where they would not be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tiny_llama
from trained_runs import IDS_BT, as_trained, exported, logits, make_run

from workbench.errors import UserError
from workloads.gguf_file import SIGNS, check_convertible, cut_of, write_gguf

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TEXT = "def test_it(n: int) -> None:\n    assert n == 1234567, 'it\\'s'  # naïve  ☂ <|user|>hello<|end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("base")))


def made(kind: str, tokenizer: Any, **sizes: Any) -> Any:
    import transformers as t

    torch.manual_seed(0)
    config, model = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
        "gemma2": (t.Gemma2Config, t.Gemma2ForCausalLM),
    }[kind]
    filled = len(tokenizer) + 24  # as of models whose embedding is padded to a multiple
    whole: Any = model(config(**SIZES, vocab_size=filled, eos_token_id=tokenizer.eos_token_id, **sizes))
    for name, parameter in whole.named_parameters():  # norms and biases that are not 1 and 0
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return whole.eval()


def read_back(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "head_dim": 32, "rope_parameters": {"rope_theta": 5e5}}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_the_file_has_the_logits_of_the_model(kind: str, sizes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = made(kind, tokenizer, **sizes)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "float32")
    again = read_back(tmp_path / "model.gguf")
    assert torch.allclose(again(IDS_BT).logits, model(IDS_BT).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_those_of_the_model(dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    model = made("llama", tokenizer).to(getattr(torch, dtype))
    write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype)
    again = read_back(tmp_path / "model.gguf")
    assert all(torch.equal(weight, model.state_dict()[name].float()) for name, weight in again.state_dict().items())


def test_the_file_has_the_tokens_of_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(made("llama", tokenizer), tokenizer, tmp_path / "model.gguf", "float32")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == tokenizer.eos_token_id


def test_positions_scaled_as_llama_3s_are_written_as_factors(tokenizer: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    write_gguf(made("llama", tokenizer, rope_parameters=rope), tokenizer, tmp_path / "model.gguf", "float32")
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    factors = found["rope_freqs.weight"]
    assert len(factors) == 8 and factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)
    assert any(1.01 < factor < 7.99 for factor in factors), "between short and long waves they go over"


def cutting(*steps: Any, ignore_merges: bool = False) -> Any:
    """A tokenizer that cuts text by ``steps``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_how_text_is_cut_has_llama_cpps_name(tokenizer: Any) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
    from transformers import PreTrainedTokenizerFast

    assert cut_of(tokenizer) == "gpt-2"
    assert cut_of(cutting(Digits(individual_digits=True), ByteLevel(add_prefix_space=False))) == "smollm"
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = ByteLevel(add_prefix_space=False, use_regex=False)
    three = cutting(Split(Regex(letters + r"\p{N}{1,3}" + SIGNS), "isolated"), rest, ignore_merges=True)
    assert cut_of(three) == "llama-bpe"
    assert cut_of(cutting(Split(Regex(letters + r"\p{N}" + SIGNS), "isolated"), rest)) == "qwen2"
    assert isinstance(three, PreTrainedTokenizerFast)


def test_what_would_be_another_model_is_refused(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig

    from workloads.tokenizer import train_tokenizer

    llama = LlamaConfig(**SIZES)
    with pytest.raises(UserError, match=r"no GGUF is written of a gemma2, .* convert_hf_to_gguf\.py"):
        check_convertible(made("gemma2", tokenizer).config, tokenizer)
    with pytest.raises(UserError, match="with yarn positions"):
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
        check_convertible(LlamaConfig(**SIZES, rope_parameters=yarn), tokenizer)
    for other in (train_tokenizer(["CCO"], 300, 64), cutting(ByteLevel(add_prefix_space=True))):
        with pytest.raises(UserError, match="cuts text as none of gpt-2, smollm, qwen2, llama-bpe does"):
            check_convertible(llama, other)


def test_a_run_becomes_a_file(tmp_path: Path, runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    base = make_tiny_llama(tmp_path / "base", hidden=64)
    folder, summary = exported(make_run(base, tmp_path), "format=gguf", "dtype=float32", f"out={tmp_path / 'mine'}")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "mine.gguf"]
    assert "llama-cli -m mine/mine.gguf" in (folder / "README.md").read_text()
    run = runs_root / "train-sft"
    wanted = as_trained(base, next(run.iterdir()), "qlora")
    assert torch.allclose(logits(read_back(folder / "mine.gguf")), wanted, atol=1e-5, rtol=0)
    assert summary["weights"] == "adapter"
