"""Engines divided over ranks give every token the probability that one rank gives it: tensor, pipeline and expert
parallelism, a draft, a prefix cache, on vLLM's CPU build. Minutes: ``make soak``."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_expert_map
import openai
import pytest
import torch
from models import make_tiny_llama, make_tiny_moe, quantise
from vllm_logprobs import ask_transformers, ask_vllm

from serve import availability, down, up
from serve.application import deployed
from serve.engine import CPU_STAGES
from serve.keys import default_key_file, read_key
from workbench.config import load
from workbench.errors import Failure
from workbench.runs import Run, open_run

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(availability.available() is not None, reason=str(availability.available())),
]

TOLERANCE = 2e-5
"""Nats, in float32: ranks sum in another order."""
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
IDS = torch.randint(5, 1000, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def by_transformers(model: Path) -> torch.Tensor:
    return torch.tensor(ask_transformers(str(model), IDS))


def by_vllm(model: Path, environment: dict[str, str] | None = None, **engine: Any) -> torch.Tensor:
    [found] = ask_vllm([(str(model), None)], IDS, rank=8, engine=engine, environment=environment)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("engine", "environment"),
    [
        ({"tensor_parallel_size": 2}, {}),
        ({"pipeline_parallel_size": 2, **CPU_STAGES}, {"VLLM_PP_LAYER_PARTITION": "1,3"}),
    ],
    ids=["tensor", "pipeline of 1 and 3 layers"],
)
def test_a_dense_model_on_two_ranks(tmp_path: Path, engine: dict[str, Any], environment: dict[str, str]) -> None:
    model = make_tiny_llama(tmp_path / "model")
    wanted = by_transformers(model)
    assert (by_vllm(model, {**TWO, **environment}, **engine) - wanted).abs().max() < TOLERANCE


def test_a_mixture_of_experts_on_one_rank_and_on_two(tmp_path: Path) -> None:
    model = make_tiny_moe(tmp_path / "model")
    wanted = by_transformers(model)
    assert (by_vllm(model) - wanted).abs().max() < TOLERANCE
    assert (by_vllm(model, TWO, tensor_parallel_size=2) - wanted).abs().max() < TOLERANCE


def test_experts_on_two_ranks_are_the_whole_model(tmp_path: Path) -> None:
    """With the tests' plugin: vLLM's own CPU kernel cannot."""
    model = make_tiny_moe(tmp_path / "model")
    plugin = cpu_expert_map.install(tmp_path / "plugin")
    found = by_vllm(model, {**TWO, **plugin}, tensor_parallel_size=2, enable_expert_parallel=True)
    assert (found - by_transformers(model)).abs().max() < TOLERANCE


def has_four_bit_kernel() -> bool:
    """Whether vLLM's build for this CPU has one: that for AVX2 has none."""
    asking = (
        "import torch, vllm.platforms; from vllm.platforms import current_platform; "
        "current_platform.import_kernels(); print(hasattr(torch.ops._C, 'cpu_gemm_wna16'))"
    )
    return subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True).stdout.endswith("True\n")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_in_four_bits(tmp_path: Path, method: str) -> None:
    """In bfloat16: the reference has the same quantised numbers."""
    if not has_four_bit_kernel():
        pytest.skip("vLLM's build for this CPU has no 4-bit kernel: it takes AVX-512")
    model = quantise(make_tiny_llama(tmp_path / "base"), tmp_path / method, method)
    difference = (by_vllm(model, dtype="bfloat16") - by_transformers(model / "undone")).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.1


def opened(name: str, config: Any) -> Run:
    with open_run("serve", name, config) as run:
        return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serving(ray_session: None, runs_root: Path) -> Iterator[int]:
    """A port to serve at; whatever is up is taken down."""
    yield free_port()
    down.run(down.DownConfig(), opened("down", down.DownConfig()))


def config_of(port: int, *models: str) -> up.ServeConfig:
    return load(
        up.ServeConfig,
        None,
        [f"models=[{', '.join(models)}]", f"port={port}", "timeout=540", "replace=true", "block=false"],
    )


def test_changing_one_model_leaves_the_other_alone(serving: int, tmp_path: Path) -> None:
    model, draft = (str(make_tiny_llama(tmp_path / name, seed=seed)) for name, seed in (("model", 0), ("draft", 0)))
    stays = f"{{name: stays, source: '{model}', device: cpu, role: embedding}}"
    first = config_of(serving, stays, f"{{name: changes, source: '{model}', device: cpu}}")
    url = up.run(first, opened("up", first))["url"]
    before = deployed()
    assert before is not None and before.roles() == {"stays": "embedding", "changes": "chat"}
    with openai.OpenAI(base_url=url, api_key=read_key(default_key_file()), max_retries=0) as client:
        assert len(client.embeddings.create(model="stays", input="hello").data[0].embedding) == 128

        def written() -> str:
            answer = client.completions.create(
                model="changes", prompt="def test", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        alone = written()
        engine = f"{{speculative_config: {{method: draft_model, model: '{draft}', num_speculative_tokens: 3}}}}"
        second = config_of(serving, stays, f"{{name: changes, source: '{model}', device: cpu, engine: {engine}}}")
        up.run(second, opened("up", second))
        after = deployed()
        assert after is not None
        assert after.workers_of("stays") == before.workers_of("stays")
        assert after.workers_of("changes") != before.workers_of("changes")
        assert written() == alone, "a draft changes the speed alone"
        broken = config_of(
            serving, stays, f"{{name: changes, source: '{model}', device: cpu, engine: {{max_model_len: 99999}}}}"
        )
        with pytest.raises(Failure, match="max_model_len"):
            up.run(broken, opened("up", broken))
        assert client.embeddings.create(model="stays", input="hello").data
