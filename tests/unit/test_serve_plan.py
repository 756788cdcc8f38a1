"""What a model takes and where it fits: against published sizes, against files written here, and by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import make_tiny_llama, quantise

from serve import plan
from serve.cards import card_of, named_card
from serve.model_size import ModelSize, attention_of, read_size
from serve.split import GIB, Card, Serving, Split, fit, layers_by_memory, objection
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import open_run

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64
}  # fmt: skip
QWEN3_30B_A3B = QWEN3_8B | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL = LLAMA_8B | {
    "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}  # fmt: skip
DEEPSEEK_V2_LITE = LLAMA_8B | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_position_embeddings": 163840,
}  # fmt: skip
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}


def size_of(folder: Path, config: dict[str, Any]) -> ModelSize:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_size(str(folder))


@pytest.mark.parametrize(
    ("config", "parameters", "kv_token"),
    [
        (LLAMA_8B, 8_030_261_248, 128 << 10),
        (QWEN3_8B, 8_190_735_360, 144 << 10),
        (QWEN3_32B, 32_762_123_264, 256 << 10),
        (QWEN3_30B_A3B, 30_532_122_624, 96 << 10),
        (MIXTRAL, 46_702_792_704, 128 << 10),
        (DEEPSEEK_V2_LITE, 15_706_484_224, 27 * 576 * 2),  # latent attention: 512 + 64 numbers a layer
    ],
    ids=["llama-3.1-8b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite"],
)
def test_parameters_and_cache_are_the_published_ones(
    tmp_path: Path, config: dict[str, Any], parameters: int, kv_token: int
) -> None:
    size = size_of(tmp_path, config)
    assert size.parameters == parameters
    assert size.bytes == 2 * parameters
    assert size.kv_bytes(1) == kv_token
    assert size.kv_bytes(1000, "fp8") == 500 * kv_token


def test_a_token_of_mixtral_meets_two_experts_of_eight(tmp_path: Path) -> None:
    size = size_of(tmp_path, MIXTRAL)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert size.active == size.parameters - experts * 6 // 8 - 32000 * 4096  # 12.9 billion with the embeddings


def test_awq_has_half_a_byte_a_number_and_a_scale_and_zero_for_128(tmp_path: Path) -> None:
    size = size_of(tmp_path, QWEN3_32B | {"dtype": "float16"} | AWQ)
    linear = 64 * 5120 * (2 * 64 * 128 + 2 * 8 * 128 + 3 * 25600)
    assert size.scales == linear // 128 * 5 // 2
    assert size.bytes == linear // 2 + 2 * (size.parameters - linear)


def test_a_sliding_window_and_what_is_in_flight_bound_the_cache(tmp_path: Path) -> None:
    """4,095 tokens of the window and two steps, in blocks of 16, and a block: as vLLM's ``SlidingWindowSpec``."""
    kinds = ["sliding_attention"] * 16 + ["full_attention"] * 16
    config = LLAMA_8B | {
        "model_type": "qwen2",
        "layer_types": kinds,
        "sliding_window": 4096,
        "use_sliding_window": True,
    }
    size = size_of(tmp_path, config)
    assert size.kv_bytes(32768) == 4096 * (16 * (4096 + 2 * 2048 + 16) + 16 * 32768)
    assert size.kv_bytes(5000) == 4096 * 32 * 5000
    for card, step in ((Card("a", 32), 2048), (Card("b", 96), 8192)):
        [rank] = fit(size, Split((32,)), [card], Serving(32768)).ranks
        assert rank.kv_sequence == 4096 * (16 * (4096 + 2 * step + 16) + 16 * 32768)
    [rank] = fit(size, Split((32,)), [Card("b", 96)], Serving(32768, batched_tokens=1024)).ranks
    assert rank.kv_sequence == 4096 * (16 * (4096 + 2 * 1024 + 16) + 16 * 32768)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (
            {"model_type": "nemotron_h", "num_hidden_layers": 52,
             "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"}, 4,
        ),
        ({"model_type": "lfm2", "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}, 6),
        ({"model_type": "recurrent_gemma", "num_hidden_layers": 26}, 8),
    ],
    ids=["nemotron-h-8b", "lfm2-1.2b", "recurrentgemma-2b"],
)  # fmt: skip
def test_layers_of_hybrids_without_attention_cache_nothing(config: dict[str, Any], attention: int) -> None:
    from transformers import AutoConfig

    found = attention_of(AutoConfig.for_model(**config))
    assert (len(found), sum(layer is not None for layer in found)) == (config["num_hidden_layers"], attention)


def test_float32_is_served_in_16_bits_unless_it_is_asked_for(tmp_path: Path) -> None:
    size = size_of(tmp_path, LLAMA_8B | {"dtype": "float32"})
    asked = read_size(str(tmp_path), "float32")
    assert size.bytes == 2 * size.parameters and size.kv_bytes(1) == 128 << 10
    assert (asked.bytes, asked.kv_bytes(1)) == (2 * size.bytes, 2 * size.kv_bytes(1))


@pytest.mark.parametrize(("method", "parameters"), [("mxfp4", 64000 + 4 * 128 * 64), ("novel", 64000 + 4 * 128 * 32)])
def test_any_quantisation_is_measured_by_its_files(tmp_path: Path, method: str, parameters: int) -> None:
    import torch
    from safetensors.torch import save_file

    config = MIXTRAL | {
        "model_type": "gpt_oss", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 4, "quantization_config": {"quant_method": method},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    if method == "novel":
        with pytest.raises(UserError, match="'novel' is known here: give a folder with its weights"):
            read_size(str(tmp_path))
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        "model.embed_tokens.weight": torch.zeros(1000, 64, dtype=torch.bfloat16),
        f"{experts}_blocks": torch.zeros(4, 128, 2, 16, dtype=torch.uint8),
        f"{experts}_scales": torch.zeros(4, 128, 2, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    size = read_size(str(tmp_path))
    assert (size.bytes, size.scales) == (2 * 64000 + 4 * 128 * 32, 4 * 128 * 2)
    assert (size.parameters, size.format) == (parameters, method)


def test_mxfp4_by_config_packs_experts_and_nothing_that_it_names(tmp_path: Path) -> None:
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = MIXTRAL | {
        "model_type": "gpt_oss", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 4, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skipped},
    }  # fmt: skip
    size = size_of(tmp_path, config)
    packed = {tensor.name.split(".")[3] for tensor in size.tensors if tensor.scales}
    assert packed == {"mlp"}
    assert not [tensor.name for tensor in size.tensors if tensor.scales and "router" in tensor.name]


def test_a_folder_is_measured_by_its_files(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    size = read_size(str(folder))
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert size.bytes == (folder / "model.safetensors").stat().st_size - header - 8
    assert size.tied
    (folder / "model.safetensors").unlink()
    assert read_size(str(folder)).parameters == size.parameters


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_are_measured_by_their_files(tmp_path: Path, method: str) -> None:
    base = make_tiny_llama(tmp_path / "base")
    folder = quantise(base, tmp_path / method, method)
    size, whole = read_size(str(folder)), read_size(str(base))
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert size.bytes + size.scales == (folder / "model.safetensors").stat().st_size - header - 8
    assert size.parameters == whole.parameters
    assert size.format == method
    (folder / "model.safetensors").unlink()
    planned = read_size(str(folder))
    assert planned.parameters == whole.parameters and planned.bytes == size.bytes
    indices = 4 * 7 * 128 * 4 + 4 * 128 * 4 if method == "gptq" else 0  # GPTQ's g_idx, which is not planned for
    assert size.scales - planned.scales == indices


def test_a_gguf_file_is_measured_by_its_table(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 2), (writer.add_embedding_length, 64), (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2), (writer.add_feed_forward_length, 96), (writer.add_context_length, 512),
    ):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float16))
    for layer in range(2):
        packed = gguf.quantize(np.ones((96, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = read_size(str(file))
    assert size.parameters == 100 * 64 + 2 * 96 * 64
    assert size.bytes == 2 * 100 * 64 + 2 * 96 * 64 * 34 // 32  # a scale in 16 bits for 32 numbers of 8
    assert size.kv_bytes(10) == 10 * 2 * (2 * 2 * 16) * 2
    assert (size.vocabulary, size.layers, size.tied) == (100, 2, True)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no GGUF file"):
        read_size(str(file))


def test_heads_of_each_layer_of_a_gguf_file(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "lfm2")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_array("lfm2.attention.head_count_kv", [0, 2, 0])
    writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = read_size(str(file))
    assert size.layers == 3 and size.kv_bytes(10) == 10 * 2 * 2 * 16 * 2


def test_weights_that_are_cut_off_are_named(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="1,000 bytes are missing"):
        read_size(str(folder))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hub name of a model"):
        read_size(str(tmp_path))


def test_tensor_parallel_ranks_hold_half_each_and_what_is_not_divided(tmp_path: Path) -> None:
    size = size_of(tmp_path, LLAMA_8B)
    one = fit(size, Split((32,)), [Card("a", 96)], Serving(8192))
    two = fit(size, Split((32,), tensor=2), [Card("a", 96), Card("b", 96)], Serving(8192))
    norms = 65 * 4096 * 2
    assert one.ranks[0].weights == size.bytes
    assert [rank.weights for rank in two.ranks] == [(size.bytes - norms) // 2 + norms] * 2
    assert two.ranks[0].kv_sequence * 2 == one.ranks[0].kv_sequence == GIB


def test_key_value_heads_fewer_than_ranks_are_held_twice(tmp_path: Path) -> None:
    size = size_of(tmp_path, LLAMA_8B | {"num_key_value_heads": 2})
    ranks = fit(size, Split((32,), tensor=4), [Card("a", 96)] * 4, Serving(8192)).ranks
    assert ranks[0].kv_token == size.kv_bytes(1) // 2


def test_expert_parallel_ranks_hold_half_of_the_experts_and_all_of_the_attention(tmp_path: Path) -> None:
    size = size_of(tmp_path, QWEN3_30B_A3B)
    found = fit(size, Split((48,), data=2, expert=True), [Card("a", 96)] * 2, Serving(4096))
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert [rank.experts for rank in found.ranks] == [64, 64]
    assert [rank.weights for rank in found.ranks] == [size.bytes - experts // 2] * 2
    assert found.ranks[0].kv_sequence == size.kv_bytes(4096)


def test_pipeline_stages_add_up_and_the_larger_card_takes_more_layers(tmp_path: Path) -> None:
    size = size_of(tmp_path, LLAMA_8B)
    cards = [Card("small", 16), Card("large", 32)]
    layers = layers_by_memory(size, cards, Serving(8192))
    found = fit(size, Split(layers), cards, Serving(8192))
    assert sum(layers) == 32 and layers[1] > layers[0]
    assert sum(rank.weights for rank in found.ranks) == size.bytes
    others = [fit(size, Split((n, 32 - n)), cards, Serving(8192)).sequences for n in range(1, 32)]
    assert found.sequences == max(others)


@pytest.mark.parametrize("memories", [(8, 8, 8), (16, 96), (6, 6), (24, 8, 48, 8)])
def test_every_split_by_memory_has_all_layers_and_none_is_empty(tmp_path: Path, memories: tuple[int, ...]) -> None:
    size = size_of(tmp_path, LLAMA_8B)
    layers = layers_by_memory(size, [Card("c", gb) for gb in memories], Serving(8192))
    assert sum(layers) == 32 and min(layers) >= 1


def test_one_sequence_is_bound_by_the_bytes_it_reads(tmp_path: Path) -> None:
    size = size_of(tmp_path, LLAMA_8B)
    found = fit(size, Split((32,)), [Card("a", 32, 1792)], Serving(8192))
    read = size.bytes - 128256 * 4096 * 2 + GIB  # all but the table of embeddings, and the cache
    assert found.tokens_per_s == pytest.approx(1792e9 / read, rel=1e-6)


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        (Split((32,), tensor=3), "32 attention heads"),
        (Split((16, 15)), "32 layers"),
        (Split((32, 0)), "without layers"),
        (Split((32,), data=2), "give replicas"),
        (Split((32,), expert=True, data=2), "mixture of experts"),
    ],
)
def test_a_split_that_vllm_cannot_make_is_refused(tmp_path: Path, split: Split, reason: str) -> None:
    assert reason in objection(size_of(tmp_path, LLAMA_8B), split)


def test_the_plan_tells_what_lacks_and_where(tmp_path: Path, runs_root: Path) -> None:
    size_of(tmp_path / "model", QWEN3_30B_A3B)
    given = [f"source={tmp_path / 'model'}", "cards=[rtx-5090:32, rtx-pro-6000:96]", "lengths=[8192]"]
    config = load(plan.PlanConfig, None, given)
    with open_run("serve", "plan", config) as run:
        summary = plan.run(config, run)
    fits = {row["cards"] + " / " + row["split"]: row["fits"] for row in summary["splits"]}
    assert fits["rtx-5090 / one card"].startswith("no: rtx-5090: 0.92 x 32 = 29.4 GiB, less 56.87 weights")
    assert fits["rtx-pro-6000 / one card"].startswith("yes: ")
    assert [row for row in fits if "pipeline 2" in row and fits[row].startswith("yes")]
    assert summary["experts"] == 128


def test_a_card_is_typed_by_model_and_memory() -> None:
    assert named_card("rtx-5090:32") == card_of("rtx-5090", 32)
    assert named_card("rtx-5090:32").bandwidth == 1792
    assert named_card("24").memory_gb == 24
    with pytest.raises(UserError, match="rtx-5090:32"):
        named_card("rtx-5090")
