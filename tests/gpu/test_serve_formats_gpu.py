"""Formats of weights, a draft model and the plan of a model's memory on an NVIDIA card."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")

IDS = list(range(5, 105))


def by_vllm(model: Path, **engine: Any) -> Any:
    from vllm_logprobs import ask_vllm

    [found] = ask_vllm([(str(model), None)], IDS, rank=8, engine={"dtype": "bfloat16", **engine})
    return torch.tensor(found)


def by_transformers(model: Path) -> Any:
    from vllm_logprobs import ask_transformers

    return torch.tensor(ask_transformers(str(model), IDS))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_in_four_bits(tmp_path: Path, method: str) -> None:
    """In bfloat16: the reference has the same quantised numbers."""
    from models import make_tiny_llama, quantise

    model = quantise(make_tiny_llama(tmp_path / "base", hidden=256), tmp_path / method, method)
    difference = (by_vllm(model) - by_transformers(model / "undone")).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.1


def test_weights_that_are_made_fp8_as_they_load(tmp_path: Path) -> None:
    from models import make_tiny_llama

    model = make_tiny_llama(tmp_path / "model", hidden=256)
    difference = (by_vllm(model, quantization="fp8_per_tensor") - by_transformers(model)).abs()
    assert 0 < difference.mean() < 0.05 and difference.max() < 0.25


def test_a_draft_changes_the_speed_alone(ray_session: None, runs_root: Path, tmp_path: Path) -> None:
    """In float32, so that four tokens at once have the likeliest of one at a time."""
    import openai
    from models import make_tiny_llama
    from test_serve_gpu import free_port

    from serve import down, up
    from serve.keys import default_key_file, read_key
    from workbench.config import load
    from workbench.runs import open_run

    model = make_tiny_llama(tmp_path / "model", hidden=256)
    draft = f"speculative_config: {{method: draft_model, model: '{model}', num_speculative_tokens: 3}}"
    written = []
    for more in ("", f", {draft}"):
        engine = f"{{dtype: float32, gpu_memory_utilization: 0.3{more}}}"
        entry = f"{{name: tiny, source: '{model}', device: gpu, engine: {engine}}}"
        config = load(up.ServeConfig, None, [f"models=[{entry}]", f"port={free_port()}", "block=false", "timeout=500"])
        with open_run("serve", "up", config) as run:
            url = up.run(config, run)["url"]
            try:
                with openai.OpenAI(base_url=url, api_key=read_key(default_key_file())) as client:
                    answer = client.completions.create(
                        model="tiny", prompt="def test", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
                    )
                written.append(answer.choices[0].text)
            finally:
                down.run(down.DownConfig(), run)
    assert written[0] == written[1]


def test_the_plan_beside_what_a_card_holds(tmp_path: Path) -> None:
    """Weights and cache by vLLM's own count and by torch's allocator; what the plan assumes for the engine may be too
    much by 2 GiB, and not too little."""
    from vllm_memory import PLANNED, ask_memory

    from serve.model_size import read_size
    from serve.split import GIB, Card, Serving, Split, fit

    (tmp_path / "config.json").write_text(json.dumps(PLANNED))
    total = torch.cuda.get_device_properties(0).total_memory
    held = ask_memory(str(tmp_path), gpu_memory_utilization=0.4, max_model_len=2048, max_num_batched_tokens=2048)
    size = read_size(str(tmp_path))
    serving = Serving(2048, utilization=0.4, batched_tokens=2048)
    [rank] = fit(size, Split((size.layers,)), [Card("this", total / GIB)], serving).ranks
    cache = held["cache_tokens"] * rank.kv_token
    assert held["weights"] == rank.weights
    assert rank.spare <= cache < rank.spare + 2 * GIB
    assert held["allocated"] == pytest.approx(rank.weights + cache, rel=0.1)
