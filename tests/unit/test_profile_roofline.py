"""The work of a model by hand, and the roof over it; what is measured is measured on this very device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig

from profiling.model_work import ModelShape, Work, read_shape
from profiling.roofline import RooflineConfig, _name, _of_run, measure_device, roofline, row_of, works
from workbench.config import load
from workbench.errors import UserError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def test_weights_are_those_that_a_token_is_multiplied_with(llama: Path) -> None:
    shape, _ = read_shape(llama, number_bytes=2)
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # q and o; k and v, with half the heads; the MLP; norms
    assert shape.weights == 2 * layer + 32 + 64 * 32  # the tied table is the head
    assert shape.all_weights == shape.weights
    assert shape.cache_bytes == 2 * 2 * 16 * 2


def test_of_experts_only_those_that_a_token_takes_count(tmp_path: Path) -> None:
    MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1).save_pretrained(tmp_path)
    shape, _ = read_shape(tmp_path, number_bytes=2)
    assert shape.all_weights - shape.weights == 2 * 3 * (3 * 32 * 48) + 64 * 32  # three idle experts; the embeddings


def test_of_experts_those_are_read_that_any_token_takes(tmp_path: Path) -> None:
    MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path)
    shape, _ = read_shape(tmp_path, number_bytes=2)
    experts = 2 * 4 * (3 * 32 * 48)
    always = shape.all_weights - experts - 64 * 32  # not the embeddings
    for tokens, drawn in ((1, 2.0), (2, 3.0), (3, 3.5)):
        read = shape.decode(tokens, 0).bytes / 2
        assert read == pytest.approx(always + experts * drawn / 4)
    assert shape.prefill(1, 512).bytes - 512 * shape.cache_bytes == pytest.approx(2 * (always + experts))


def test_a_tied_table_counts_once_whatever_its_name(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16).save_pretrained(tmp_path)
    shape, _ = read_shape(tmp_path, number_bytes=2)
    assert shape.head == 64 * 32
    assert shape.all_weights - shape.weights == 16 * 32  # the positions alone are looked up


def quantise(folder: Path, **told: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))


GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}


@pytest.mark.parametrize(
    "told, bits",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": GROUPS}, 4),
    ],
)
def test_quantised_weights_are_read_in_their_bits_and_not_measured(
    llama: Path, told: dict[str, Any], bits: int
) -> None:
    plain, _ = read_shape(llama, 2)
    quantise(llama, **told)
    shape, _ = read_shape(llama, 2)
    assert shape.decode(1, 0).bytes == (plain.weights - plain.head) * bits / 8 + plain.head * 2
    config = RooflineConfig(model=llama, decode=[1], matrix=64, buffer=1 << 16, rounds=1)
    assert works(config, shape).keys() == {"prefill", "decode x1"}
    assert measure_device(config.model_dump(mode="json"))["seconds"] == {}


def test_a_method_that_does_not_tell_its_bits_is_refused(llama: Path) -> None:
    for told in ({"quant_method": "mxfp4"}, {"quant_method": "bitsandbytes"}, {"quant_method": "gptq"}):
        quantise(llama, **told)
        with pytest.raises(UserError, match=r"how many bits.*known are bitsandbytes"):
            read_shape(llama, 2)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'mamba' is no transformer"):
        read_shape(tmp_path, 2)


SHAPE = ModelShape(
    weights=1e9, all_weights=1e9, layers=10, width=1000, key_value_width=500, number_bytes=2, weight_bytes=2, head=1e8
)


def test_work_by_hand() -> None:
    assert SHAPE.decode(1, 1000) == Work(2e9 + 4e7, 2e9 + 2e7)
    assert SHAPE.prefill(2, 1000) == Work(2 * (1.8e12 + 2e8 + 2e10), 2e9 + 4e7)  # the head once a sequence
    assert SHAPE.training(2, 1000) == Work(3 * (4e12 + 4e10), 20e9)


def test_a_decode_is_bound_by_memory_and_a_prefill_by_the_matrix_rate() -> None:
    decode = row_of("decode", SHAPE.decode(1, 1000), 2.02e-3, rate=100e12, bandwidth=2e12)
    assert decode["bound_by"] == "memory" and decode["limit_ms"] == pytest.approx(1.01)
    assert decode["percent_of_limit"] == 50.0
    prefill = row_of("prefill", SHAPE.prefill(1, 1000), None, rate=100e12, bandwidth=2e12)
    assert prefill["bound_by"] == "matrix rate" and prefill["limit_ms"] == pytest.approx(18.202)
    assert prefill["measured_ms"] is prefill["percent_of_limit"] is None


def test_a_model_is_measured_where_it_runs(llama: Path) -> None:
    config = RooflineConfig(
        model=llama, dtype="float32", prompt=16, decode=[1, 2], train_sequences=2, matrix=128, buffer=1 << 20, rounds=2
    )
    measured = measure_device(config.model_dump(mode="json"))
    shape, _ = read_shape(llama, 4)
    assert measured["seconds"].keys() == works(config, shape).keys()
    rate, bandwidth = measured["operations_per_second"], measured["bytes_per_second"]
    rows = [
        row_of(name, work, measured["seconds"][name], rate, bandwidth) for name, work in works(config, shape).items()
    ]
    roof, limits, points = roofline(rows, rate, bandwidth).data
    assert max(roof.y) * 1e9 == pytest.approx(rate)
    assert len(limits.x) == len(points.x) == 4


def test_a_model_that_does_not_fit_is_left_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = RooflineConfig(model=llama, matrix=64, buffer=1 << 16, rounds=1)
    real = AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda made, **keys: full() if "dtype" in keys else real(made)
    )
    measured = measure_device(config.model_dump(mode="json"))
    assert measured["seconds"] == {} and measured["operations_per_second"] > 0


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no decoder-only model"):
        read_shape(tmp_path, 2)


def test_the_rate_of_a_run_is_shared_by_its_workers(llama: Path, tmp_path: Path) -> None:
    shape, _ = read_shape(llama, 2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "tokens_per_second": 1000}\n')
    config = RooflineConfig(model=llama, prompt=100, train_sequences=2, train_run=tmp_path)
    for workers, took in ((1, 200), (2, 400)):
        (tmp_path / "config.yaml").write_text(f"workers: {workers}\n")
        assert _of_run(config, shape, 1e12, 1e11)["measured_ms"] == pytest.approx(took)


@pytest.mark.parametrize("decode", ["[0]", "[1, -8]", "[]"])
def test_sequences_that_are_none_are_refused(llama: Path, decode: str) -> None:
    with pytest.raises(UserError, match="decode"):
        load(RooflineConfig, None, [f"model={llama}", f"decode={decode}"])


def test_a_device_is_named_by_what_it_is() -> None:
    assert [_name(torch.device(kind)) for kind in ("cpu", "mps")] == [
        f"{torch.get_num_threads()} CPU threads", "the Mac's GPU"
    ]  # fmt: skip
