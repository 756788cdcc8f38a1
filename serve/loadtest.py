"""Measure an OpenAI-compatible endpoint under load: throughput, time to first token and latency.

    workbench serve loadtest configs/demo/loadtest.yaml

Each model is tested alone, at each concurrency level in turn, with streaming chat completions.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from serve.endpoint import DEFAULT_URL, choose_model, open_client, served_models
from serve.keys import client_key
from serve.traffic import Outcome, Target, drive
from workbench.config import Config, InputPath, OutputPath
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

QUANTILES = (50, 95, 99)
QUESTIONS = [
    "How many rings does this molecule have: c1ccc2ccccc2c1?",
    "Name the functional groups of CC(=O)O.",
    "Explain in one sentence what a hash table is.",
    "Which element has the symbol Fe?",
    "Write the molecular formula of ethanol.",
    "What does a compiler do?",
    "Is benzene aromatic? Answer yes or no and why.",
    "List three uses of a queue in an operating system.",
]
"""Prompts where no file is given."""


class LoadTestConfig(Config):
    """What to send, where, how hard."""

    base_url: str = Field(default=DEFAULT_URL, description="OpenAI-compatible endpoint")
    models: list[str] | None = Field(default=None, description="Models to test, one after the other; default: all")
    api_key_file: OutputPath | None = Field(
        default=None, description="File of the API key; default OPENAI_API_KEY, else the key that 'serve up' made"
    )
    concurrency: list[int] = Field(default=[1, 4, 16], min_length=1, description="Requests in flight, one level each")
    seconds: float = Field(default=5.0, gt=0, description="Seconds a level; requests in flight at its end may finish")
    max_tokens: int = Field(default=32, ge=1, description="Tokens of each answer")
    ignore_eos: bool = Field(default=True, description="Make every answer max_tokens long; false for servers not vLLM")
    prompts: InputPath | None = Field(default=None, description="JSONL with 'prompt', or 'instruction' and 'input'")
    max_prompts: int = Field(default=512, ge=1, description="Different prompts at most")
    timeout: float = Field(default=120.0, gt=0, description="Seconds for one request")
    seed: int = Field(default=0, description="Order of the prompts")


def check(config: LoadTestConfig) -> None:
    """Raise UserError for a file of prompts that cannot be read."""
    if config.prompts:
        read_prompts(config.prompts, config.max_prompts)


def run(config: LoadTestConfig, run: Run) -> Summary:
    """Test each model at each level. Raises Failure if no request of a level succeeded."""
    prompts = read_prompts(config.prompts, config.max_prompts) if config.prompts else list(QUESTIONS)
    random.Random(config.seed).shuffle(prompts)
    if config.prompts:
        run.input("prompts", config.prompts)
    with open_client(config.base_url, config.api_key_file, config.timeout) as client:
        served = served_models(client)
    models = [choose_model(served, name) for name in config.models] if config.models else list(served)
    rows: list[dict[str, Any]] = []
    latencies: dict[tuple[str, int], list[Outcome]] = {}
    for model in models:
        target = Target(
            config.base_url.rstrip("/"), client_key(config.api_key_file), model, config.max_tokens, config.ignore_eos,
            config.timeout,
        )  # fmt: skip
        drive(target, prompts[:1], 1, 0.001)  # a first request, so that no level pays for a cold cache or connection
        for level in config.concurrency:
            outcomes, wall = drive(target, prompts, level, config.seconds)
            row = summarise(outcomes, wall)
            if row["requests"] == row["errors"]:
                raise Failure(f"{model} at concurrency {level}: no request succeeded ({row['error_kinds']})")
            rows.append({"model": model, "concurrency": level, **row})
            latencies[model, level] = [outcome for outcome in outcomes if not outcome.error]
            numbers = {f"{model}/{key}": value for key, value in row.items() if isinstance(value, float)}
            run.metrics(len(rows), concurrency=level, **numbers)
            run.say(
                f"{model} x{level}: {row['output_tokens_per_s']:.0f} tokens/s, {row['requests_per_s']:.1f} requests/s, "
                f"first token p50 {row['ttft_p50_ms']:.0f} ms, latency p95 {row['latency_p95_ms']:.0f} ms, "
                f"{row['errors']} errors"
            )
    _report(run, config, rows, latencies)
    best = {m: max((r for r in rows if r["model"] == m), key=lambda r: r["output_tokens_per_s"]) for m in models}
    first = {m: next(r for r in rows if r["model"] == m) for m in models}
    return {
        "models": ", ".join(models),
        "requests": sum(row["requests"] for row in rows),
        "errors": sum(row["errors"] for row in rows),
        **{f"{m}_best_tokens_per_s": round(best[m]["output_tokens_per_s"], 1) for m in models},
        **{f"{m}_best_concurrency": best[m]["concurrency"] for m in models},
        **{f"{m}_x{first[m]['concurrency']}_ttft_p50_ms": round(first[m]["ttft_p50_ms"], 1) for m in models},
    }


def read_prompts(path: Path, limit: int) -> list[str]:
    """The first ``limit`` prompts of a JSONL file. Raises UserError if it is no text, naming the line that has none."""
    prompts: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"prompts: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"prompts: {path} is not text: give JSONL with 'prompt', or 'instruction' and 'input'"
        ) from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        row = json.loads(line)
        text = row["prompt"] if "prompt" in row else f"{row['instruction']}\n{row.get('input') or ''}"
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}: a line is JSON with 'prompt', or 'instruction' and 'input'") from None
    return str(text).strip()


def summarise(outcomes: Sequence[Outcome], wall: float) -> dict[str, Any]:
    """Throughput over ``wall`` seconds and percentiles in milliseconds of the requests that succeeded."""
    good = [outcome for outcome in outcomes if not outcome.error]
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error)
    inter_token = [value for outcome in good if (value := outcome.inter_token) is not None]
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "error_kinds": ", ".join(f"{kind}: {number}" for kind, number in kinds.most_common()),
        "requests_per_s": len(good) / wall,
        "output_tokens_per_s": sum(outcome.output_tokens for outcome in good) / wall,
        **_percentiles("ttft", [outcome.first_token for outcome in good]),
        **_percentiles("inter_token", inter_token),
        **_percentiles("latency", [outcome.latency for outcome in good]),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """``NAME_pQ_ms`` for each quantile, linearly interpolated; None without a value."""
    import numpy as np

    if not seconds:
        return {f"{name}_p{q}_ms": None for q in QUANTILES}
    values = np.percentile(np.asarray(seconds) * 1000, QUANTILES)
    return {f"{name}_p{q}_ms": float(value) for q, value in zip(QUANTILES, values, strict=True)}


def _report(
    run: Run, config: LoadTestConfig, rows: list[dict[str, Any]], outcomes: dict[tuple[str, int], list[Outcome]]
) -> None:
    import plotly.graph_objects as go

    fewest = min(len(good) for good in outcomes.values())
    run.report.table(
        "Load",
        rows,
        note=f"Closed loop, {config.seconds:g} s a level, answers of {config.max_tokens} tokens, one pass. "
        f"The smallest level has {fewest} requests"
        + ("; below 100 its p99 is close to its maximum." if fewest < 100 else "."),
    )
    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    throughput = go.Figure()
    for model in models:
        throughput.add_scatter(
            x=[row["concurrency"] for row in of[model]], y=[row["output_tokens_per_s"] for row in of[model]],
            name=model, mode="lines+markers",
        )  # fmt: skip
    throughput.update_layout(xaxis_title="requests in flight", yaxis_title="output tokens a second", xaxis_type="log")
    run.report.figure("Throughput", throughput)
    for key, title in (("ttft", "Time to first token"), ("latency", "Latency of a whole answer")):
        figure = go.Figure()
        for model, dash in zip(models, ["solid", "dash", "dot", "dashdot"] * len(models), strict=False):
            for q in QUANTILES:
                figure.add_scatter(
                    x=[row["concurrency"] for row in of[model]], y=[row[f"{key}_p{q}_ms"] for row in of[model]],
                    name=f"{model} p{q}", mode="lines+markers", line={"dash": dash},
                )  # fmt: skip
        figure.update_layout(xaxis_title="requests in flight", yaxis_title="ms", xaxis_type="log")
        run.report.figure(title, figure)
