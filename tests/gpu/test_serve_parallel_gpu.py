"""A model on two NVIDIA cards, divided in every way: each token is as likely as on one card."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="fewer than two NVIDIA cards"
)

TOLERANCE = 0.02
"""Nats, in bfloat16 weights computed in float32."""
IDS = list(range(5, 105))


def by_vllm(model: Path, environment: dict[str, str] | None = None, **engine: Any) -> Any:
    from vllm_logprobs import ask_vllm

    [found] = ask_vllm([(str(model), None)], IDS, rank=8, engine=engine, environment=environment)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("engine", "environment"),
    [
        ({"tensor_parallel_size": 2}, {}),
        ({"pipeline_parallel_size": 2}, {"VLLM_PP_LAYER_PARTITION": "1,3"}),
    ],
    ids=["tensor", "pipeline"],
)
def test_a_dense_model(tmp_path: Path, engine: dict[str, Any], environment: dict[str, str]) -> None:
    from models import make_tiny_llama

    model = make_tiny_llama(tmp_path / "model", hidden=256)
    assert (by_vllm(model, environment, **engine) - by_vllm(model)).abs().max() < TOLERANCE


@pytest.mark.parametrize("expert", [False, True])
def test_a_mixture_of_experts(tmp_path: Path, expert: bool) -> None:
    from models import make_tiny_moe

    model = make_tiny_moe(tmp_path / "model")
    found = by_vllm(model, tensor_parallel_size=2, enable_expert_parallel=expert)
    assert (found - by_vllm(model)).abs().max() < TOLERANCE


@pytest.mark.parametrize("inside", [False, True], ids=["a gang of replicas", "one replica"])
def test_data_parallel_attention_with_experts_of_both_cards_answers(
    ray_session: None, runs_root: Path, tmp_path: Path, inside: bool
) -> None:
    """As ``configs/serve/experts_gang.yaml``, and as ``experts.yaml`` where the host's cards are named."""
    import openai
    import ray
    from models import make_tiny_moe
    from test_serve_gpu import free_port

    from serve import down, up
    from serve.keys import default_key_file, read_key
    from workbench.config import load
    from workbench.runs import open_run

    host = next((node["Labels"].get("workbench.host") for node in ray.nodes() if node["Alive"]), None)
    if inside and not host:
        pytest.skip("this Ray does not name its cards")
    model = make_tiny_moe(tmp_path / "model")
    engine = "{data_parallel_size: 2, enable_expert_parallel: true, max_model_len: 256}"
    where = f"{{gpus: all on {host}}}" if inside else "{gpu: any}"
    entry = f"{{name: tiny, source: '{model}', resources: {where}, engine: {engine}}}"
    config = load(up.ServeConfig, None, [f"models=[{entry}]", f"port={free_port()}", "block=false", "timeout=500"])
    with open_run("serve", "up", config) as run:
        url = up.run(config, run)["url"]
        try:
            with openai.OpenAI(base_url=url, api_key=read_key(default_key_file())) as client:
                answer = client.completions.create(
                    model="tiny", prompt="def", max_tokens=8, extra_body={"ignore_eos": True}
                )
            assert answer.usage is not None and answer.usage.completion_tokens == 8
        finally:
            down.run(down.DownConfig(), run)
