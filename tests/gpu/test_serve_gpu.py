"""The same deployment on an NVIDIA card: GPU bundles, compiled engine, half a card for each of two models."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_model_on_half_a_card_answers_and_is_traced(ray_session: None, runs_root: Path, tmp_path: Path) -> None:
    from models import make_tiny_llama

    from profiling.trace_events import read_traces
    from profiling.trace_summary import by_kind
    from serve import down, trace, up
    from serve.keys import default_key_file, read_key
    from workbench.config import load
    from workbench.runs import open_run

    # vLLM's GPU attention kernels want a head size of 64 or more
    model = make_tiny_llama(tmp_path / "model", hidden=256)
    entry = f"{{name: tiny, source: '{model}', device: gpu, gpus: 0.5, engine: {{gpu_memory_utilization: 0.1}}}}"
    config = load(up.ServeConfig, None, [f"models=[{entry}]", f"port={free_port()}", "block=false", "timeout=500"])
    with open_run("serve", "up", config) as run:
        url = up.run(config, run)["url"]
        try:
            with openai.OpenAI(base_url=url, api_key=read_key(default_key_file())) as client:
                asked = {"model": "tiny", "prompt": "def", "extra_body": {"ignore_eos": True}}
                answer = client.completions.create(max_tokens=8, **asked)
                with ThreadPoolExecutor(1) as pool, open_run("serve", "trace", config) as traced:
                    busy = pool.submit(lambda: [client.completions.create(max_tokens=200, **asked) for _ in range(20)])
                    trace.run(load(trace.TraceConfig, None, ["model=tiny", "seconds=2"]), traced)
                    busy.result()
            assert answer.usage is not None and answer.usage.completion_tokens == 8
            [worker] = read_traces(traced.folder)
            assert "matrix" in {row["kind"] for row in by_kind(worker)}
        finally:
            down.run(down.DownConfig(), run)
