"""A split that the cards cannot hold is refused with the arithmetic, before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_serve_plan import LLAMA_8B, QWEN3_30B_A3B, QWEN3_32B

from cluster.labels import CardOnHost
from cluster.nodes import Node
from serve.engine import engine_place
from serve.fits import Checked, check_fit, vllm_layers
from serve.model_config import ModelConfig, lora_arguments
from workbench.errors import UserError

SYSTEM_A = Node(
    "system-a",
    cards=(CardOnHost("rtx-5090", "GPU-a", 32, False), CardOnHost("rtx-pro-6000", "GPU-b", 96, True)),
    total={"CPU": 32, "GPU": 1, "rtx-5090": 1, "rtx-pro-6000": 1},
)
LINUX_BOX = Node(
    "linux-box", cards=(CardOnHost("rtx-5060-ti", "GPU-c", 16, False),), total={"CPU": 16, "GPU": 1, "rtx-5060-ti": 1}
)
UNLIKE = [SYSTEM_A, LINUX_BOX]
ALL = {"gpus": "all on system-a"}


def checked(
    folder: Path, config: dict[str, Any], nodes: list[Node] = UNLIKE, **model: Any
) -> tuple[Checked, list[str]]:
    """What the check found for a model of this config, and what it said."""
    (folder / "config.json").write_text(json.dumps(config))
    made = ModelConfig.model_validate({"name": "m", "source": str(folder), **model})
    said: list[str] = []
    place = engine_place(made, nodes)
    return check_fit(made, place.placement, nodes, place.device, said.append), said


def test_tensor_parallel_halves_that_the_smaller_card_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        checked(tmp_path, QWEN3_32B, resources=ALL, engine={"tensor_parallel_size": 2})
    assert "does not fit (tensor 2). rtx-5090 on system-a: 0.92 x 32 = 29.4 GiB, less 30.5" in str(refused.value)


def test_pipeline_stages_by_memory_fit_where_halves_do_not(tmp_path: Path) -> None:
    engine = {"pipeline_parallel_size": 2, "max_model_len": 32768}
    found, said = checked(tmp_path, QWEN3_32B, resources=ALL, engine=engine, layers="by memory")
    assert sum(found.layers) == 64 and found.layers[0] < 20 and found.fit is not None and found.fit.holds
    assert len(said) == 2 and "rtx-5090 on system-a gets" in said[0]
    with pytest.raises(UserError, match="does not fit"):
        checked(tmp_path, QWEN3_32B, resources=ALL, engine=engine)


def test_experts_their_bytes_and_the_cache_of_each_rank_are_told(tmp_path: Path) -> None:
    engine = {"data_parallel_size": 2, "enable_expert_parallel": True, "max_model_len": 8192}
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    _, said = checked(tmp_path, QWEN3_30B_A3B | fp8, resources=ALL, engine=engine)
    assert len(said) == 2
    assert "64 of 128 experts a layer" in said[0] and "GiB for KV cache (estimate)" in said[0]


def test_a_context_that_is_too_long_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        checked(tmp_path, LLAMA_8B, resources={"gpu": "rtx-5090"}, engine={"max_model_len": 131072})
    told = str(refused.value)
    fits = int(told.split("engine.max_model_len: ")[1].split(",")[0])
    assert 50_000 < fits < 131_072
    checked(tmp_path, LLAMA_8B, resources={"gpu": "rtx-5090"}, engine={"max_model_len": fits})


def test_a_plain_card_is_judged_by_the_largest_that_it_may_be(tmp_path: Path) -> None:
    engine = {"max_model_len": 8192}
    assert checked(tmp_path, LLAMA_8B, resources={"gpu": "any"}, engine=engine)[0].fit is not None
    with pytest.raises(UserError, match="rtx-5060-ti on linux-box"):
        checked(tmp_path, LLAMA_8B, resources={"gpu": "rtx-5060-ti"}, engine=engine)


def test_a_division_that_vllm_cannot_make_is_refused_on_a_cpu_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="32 attention heads"):
        checked(tmp_path, LLAMA_8B, device="cpu", engine={"tensor_parallel_size": 3})


def test_layers_by_memory_of_unknown_cards_are_refused(tmp_path: Path) -> None:
    nodes = [Node("host", total={"CPU": 8, "GPU": 2})]
    engine = {"pipeline_parallel_size": 2}
    with pytest.raises(UserError, match="give layers as numbers"):
        checked(tmp_path, LLAMA_8B, nodes, engine=engine, layers="by memory")
    assert checked(tmp_path, LLAMA_8B, nodes, engine=engine, layers=[12, 20])[0].layers == (12, 20)


def test_half_a_card_is_half_of_its_memory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 0\.5"):
        checked(tmp_path, LLAMA_8B, gpus=0.5, device="gpu")


def test_the_context_that_is_proposed_fits_where_layers_have_windows(tmp_path: Path) -> None:
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 8
    config = LLAMA_8B | {"model_type": "qwen2", "layer_types": kinds, "sliding_window": 4096}
    config |= {"use_sliding_window": True}
    with pytest.raises(UserError) as refused:
        checked(tmp_path, config, resources={"gpu": "rtx-5090"}, engine={"max_model_len": 524288})
    fits = int(str(refused.value).split("engine.max_model_len: ")[1].split(",")[0])
    checked(tmp_path, config, resources={"gpu": "rtx-5090"}, engine={"max_model_len": fits})
    with pytest.raises(UserError):
        checked(tmp_path, config, resources={"gpu": "rtx-5090"}, engine={"max_model_len": fits + 256})


@pytest.mark.parametrize(
    ("given", "tokens"), [(32768, 32768), ("32k", 32000), ("32K", 32768), ("4096", 4096), (-1, -1), ("auto", -1)]
)
def test_tokens_are_read_as_vllm_reads_them(given: Any, tokens: int) -> None:
    made = ModelConfig.model_validate({"name": "m", "source": "owner/model", "engine": {"max_model_len": given}})
    assert made.engine["max_model_len"] == tokens


def test_a_context_that_vllm_chooses_is_judged_by_one_block(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, LLAMA_8B, resources={"gpu": "rtx-5090"}, engine={"max_model_len": "auto"})
    assert found.fit is not None and found.fit.holds


def test_a_model_that_is_not_here_is_not_judged(tmp_path: Path) -> None:
    made = ModelConfig.model_validate({"name": "m", "source": "no-owner/no-such-model", "resources": {"gpu": "any"}})
    said: list[str] = []
    assert check_fit(made, engine_place(made, UNLIKE).placement, UNLIKE, "gpu", said.append) == Checked()
    assert "whether it fits will be seen" in said[0]


@pytest.mark.parametrize(("layers", "stages"), [(32, 2), (64, 3), (61, 4), (7, 2)])
def test_layers_without_a_wish_are_vllms(layers: int, stages: int) -> None:
    """As ``vllm.distributed.utils.get_pp_indices`` divides, which needs an import of vLLM to ask."""
    counts = vllm_layers(layers, stages)
    assert sum(counts) == layers and max(counts) - min(counts) <= 1 and counts[-1] == min(counts)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"layers": [1, 2]}, "pipeline_parallel_size"),
        ({"layers": [1, 2], "engine": {"pipeline_parallel_size": 3}}, "2 layer counts for 3"),
        ({"engine": {"tensor_parallel_size": "two"}}, "a number of ranks"),
        ({"engine": {"max_model_len": "long"}}, "such as 32768, 32k or 32K, not 'long'"),
        ({"engine": {"max_model_len": -2}}, "number of tokens"),
        ({"engine": {"max_num_batched_tokens": "auto"}}, "number of tokens"),
        ({"engine": {"gpu_memory_utilization": "high"}}, "such as 0.9, not 'high'"),
        ({"engine": {"gpu_memory_utilization": 90}}, "such as 0.9, not 90"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "below min_replicas"),
        ({"autoscaling": {}, "replicas": 2}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig.model_validate({"name": "m", "source": "owner/model", **model})


def adapter(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    return str(folder)


def test_the_rank_of_the_adapters_is_vllms_next(tmp_path: Path) -> None:
    two = {"a": adapter(tmp_path / "a"), "b": adapter(tmp_path / "b", r=24)}
    assert lora_arguments(two) == {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}
    assert lora_arguments({}) == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "plain LoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "merge it"),
        ({"r": 4096}, "above vLLM's 512"),
        ({"r": None}, "cannot be read"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lora_arguments({"a": adapter(tmp_path / "a", **config)})


def test_a_run_is_a_source_by_the_model_that_it_left(tmp_path: Path) -> None:
    merged = tmp_path / "run" / "artifacts" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    assert ModelConfig(name="m", source=str(tmp_path / "run")).source == str(merged)


def test_a_run_that_left_an_adapter_alone_says_how_to_serve_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "artifacts").mkdir(parents=True)
    adapter(tmp_path / "run" / "artifacts" / "adapter")
    with pytest.raises(ValueError, match="give its base as source, and adapters"):
        ModelConfig(name="m", source=str(tmp_path / "run"))
    made = ModelConfig.model_validate({"name": "m", "source": "o/m", "adapters": {"tuned": str(tmp_path / "run")}})
    assert made.adapters == {"tuned": str(tmp_path / "run" / "artifacts" / "adapter")}
