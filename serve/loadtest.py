"""Measure an OpenAI-compatible endpoint under load: throughput, time to first token, latency, goodput.

    workbench serve loadtest configs/demo/loadtest.yaml
    workbench serve loadtest configs/serve/loadtest.yaml arrival=poisson rates=[1,2,4,8]

Each model is tested alone, at each level in turn, with streaming chat completions by vLLM's load generator. Every
request is kept in ``artifacts/requests.parquet``; ``serve compare`` sets two runs beside each other.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from profiling import phase
from serve.availability import available
from serve.clocks import clock_offset
from serve.endpoint import DEFAULT_URL, choose_model, open_client, served_models
from serve.keys import client_key
from serve.load_figures import Objective, knee, summarise
from serve.load_prompts import QUESTIONS, read_prompts, read_replay, with_prefixes
from serve.load_report import report, write_requests
from serve.traffic import Arrival, Driven, Level, Prompt, Target, drive
from workbench.config import Config, InputPath, OutputPath, default_environment
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

CLOCKS_AGREE = 2.0
"""Seconds. The date of an answer tells no more than that."""
SENT_ENOUGH = 0.9
"""Of the requests a second that were asked for."""
LATE = 0.05
"""Seconds after its arrival, p99, that a request may be sent."""


class SharedPrefix(Config):
    """Texts that many prompts begin with."""

    prefixes: int = Field(default=4, ge=1, description="Different beginnings")
    words: int = Field(default=200, ge=1, description="Words of each")


class LoadTestConfig(Config):
    """What to send, where, how hard."""

    base_url: str = Field(default=DEFAULT_URL, description="OpenAI-compatible endpoint")
    models: list[str] | None = Field(default=None, description="Models to test, one after the other; default: all")
    api_key_file: OutputPath | None = Field(
        default=None, description="File of the API key; default OPENAI_API_KEY, else the key that 'serve up' made"
    )
    arrival: Arrival = Field(
        default="closed",
        description="closed: so many requests in flight; constant, poisson: at so many a second; ramp: at more and "
        "more a second; replay: as recorded",
    )
    concurrency: list[int] = Field(default=[1, 4, 16], min_length=1, description="Of closed: requests in flight")
    rates: list[float] = Field(
        default=[1.0, 2.0, 4.0], min_length=1,
        description="Of constant and poisson: requests a second, one level each; of ramp: the first and the last",
    )  # fmt: skip
    seconds: float = Field(default=5.0, gt=0, description="Seconds a level; requests in flight at its end may finish")
    max_tokens: int = Field(default=32, ge=1, description="Tokens of each answer; of a replay, where none are recorded")
    ignore_eos: bool = Field(default=True, description="Make every answer so long; false for servers not vLLM")
    prompts: InputPath | None = Field(default=None, description="JSONL with 'prompt', or 'instruction' and 'input'")
    replay: InputPath | None = Field(
        default=None, description="Recorded traffic: the gateway's request log (folder), or JSONL with 'time'"
    )
    speed: float = Field(default=1.0, gt=0, description="A replay so many times as fast as it was recorded")
    shared_prefix: SharedPrefix | None = Field(default=None, description="Let prompts share their beginnings")
    max_prompts: int = Field(default=512, ge=1, description="Different prompts at most; of a replay, requests")
    objective: Objective = Field(default=Objective(), description="What goodput counts: ttft_ms, latency_ms, ...")
    timeout: float = Field(default=120.0, gt=0, description="Seconds for one request")
    seed: int = Field(default=0, description="Order of the prompts, arrivals")

    @model_validator(mode="after")
    def _whole(self) -> "LoadTestConfig":
        if (self.arrival == "replay") != (self.replay is not None):
            raise ValueError("arrival: replay and replay: FILE belong together")
        if self.arrival == "ramp" and len(self.rates) != 2:
            raise ValueError(f"a ramp has a first and a last rate, not {self.rates}")
        if min(self.concurrency) < 1 or min(self.rates) <= 0:
            raise ValueError("requests in flight and requests a second are above 0")
        if not all(map(math.isfinite, self.rates)):
            raise ValueError("rates: give numbers")
        if self.arrival != "ramp" and any(len(set(each)) < len(each) for each in (self.concurrency, self.rates)):
            raise ValueError("concurrency and rates: give each level once")
        return self

    def levels(self) -> list[Level]:
        """The levels in turn."""
        if self.arrival == "closed":
            return [Level("closed", number, self.seconds) for number in self.concurrency]
        if self.arrival == "ramp":
            return [Level("ramp", self.rates[1], self.seconds, start=self.rates[0])]
        if self.arrival == "replay":
            return [Level("replay", 1.0, self.seconds)]
        return [Level(self.arrival, rate, self.seconds) for rate in self.rates]


def check(config: LoadTestConfig) -> None:
    """Raise UserError where the generator is not installed, or for a file of prompts that cannot be read."""
    if config.prompts or config.replay:
        make_prompts(config)
    if (reason := available()) is not None:
        raise UserError(f"the load generator is vLLM's. {reason}")


def make_prompts(config: LoadTestConfig) -> list[Prompt]:
    """What is asked, in its order."""
    if config.replay:
        return read_replay(config.replay, config.max_prompts, config.speed, config.max_tokens)
    texts = read_prompts(config.prompts, config.max_prompts) if config.prompts else list(QUESTIONS)
    random.Random(config.seed).shuffle(texts)
    if config.shared_prefix:
        texts = with_prefixes(texts, config.shared_prefix.prefixes, config.shared_prefix.words, config.seed)
    return [Prompt.of(text, config.max_tokens) for text in texts]


def run(config: LoadTestConfig, run: Run) -> Summary:
    """Test each model at each level. Raises Failure if no request of a level succeeded."""
    import numpy as np

    default_environment("VLLM_LOGGING_LEVEL", "ERROR")  # what vLLM finds of Triton is not of this command
    prompts = make_prompts(config)
    np.random.seed(config.seed)  # vLLM draws arrivals from numpy's own generator
    for name, file in (("prompts", config.prompts), ("replay", config.replay)):
        if file:
            run.input(name, file)
    with open_client(config.base_url, config.api_key_file, config.timeout) as client:
        served = served_models(client)
    models = [choose_model(served, name) for name in config.models] if config.models else list(served)
    offset = clock_offset(config.base_url.rstrip("/").removesuffix("/v1") + "/health")
    doubts = _doubts_of_clocks(offset)
    rows: list[dict[str, Any]] = []
    driven: list[Driven] = []
    for model in models:
        target = Target(
            config.base_url.rstrip("/"), client_key(config.api_key_file), model, config.ignore_eos, config.timeout
        )
        # a first request, so that no level pays for a cold cache or connection
        drive(target, prompts[:1], Level("closed", 1, 0.001))
        for level in config.levels():
            with phase(f"{model} {level.arrival}", level.load) as done:
                measured = drive(target, prompts, level)
                done |= {
                    "tokens": float(sum(o.output_tokens for o in measured.outcomes)),
                    "requests": float(len(measured.outcomes)),
                }
            row = summarise(measured, config.objective)
            if row["requests"] == row["errors"]:
                raise Failure(f"{model} at {level}: no request succeeded ({row['error_kinds']})")
            rows.append({"model": model, "level": str(level), "load": level.load, **row})
            driven.append(measured)
            doubts += _doubts(model, level, measured, row)
            numbers = {f"{model}/{key}": value for key, value in row.items() if isinstance(value, float)}
            run.metrics(len(rows), load=level.load, **numbers)
            run.say(
                f"{model} {level}: {row['output_tokens_per_s']:.0f} tokens/s, {row['requests_per_s']:.1f} requests/s, "
                f"first token p50 {row['ttft_p50_ms']:.0f} ms, latency p95 {row['latency_p95_ms']:.0f} ms, "
                f"{row['errors']} errors"
            )
    for doubt in doubts:
        run.say(f"doubt: {doubt}")
    write_requests(run.artifact("requests.parquet"), rows, driven)
    report(run, rows, config.objective, doubts, _about(config, rows), offset)
    return _summary(models, rows, doubts)


def _about(config: LoadTestConfig, rows: Sequence[dict[str, Any]]) -> str:
    fewest = min(row["requests"] - row["errors"] for row in rows)
    how = "Closed loop" if config.arrival == "closed" else f"Open loop, {config.arrival} arrivals"
    length = "as recorded" if config.arrival == "replay" else f"{config.max_tokens} tokens"
    few = "; below 100 its p99 is close to its maximum." if fewest < 100 else "."
    return (
        f"{how}, {config.seconds:g} s a level, length of answers: {length}, one pass. "
        f"The smallest level has {fewest} requests{few}"
    )


def _doubts_of_clocks(offset: tuple[float, float] | None) -> list[str]:
    if offset is None or abs(offset[0]) - offset[1] <= CLOCKS_AGREE:
        return []
    return [f"the server's clock is {offset[0]:+.1f} s from this one: its timeline does not lie beside these figures"]


def _doubts(model: str, level: Level, driven: Driven, row: dict[str, Any]) -> list[str]:
    """Why a level's figures may not be the server's."""
    found = []
    if reason := driven.watch.saturated():
        found.append(f"{model} {level}: {reason}")
    if level.arrival in ("constant", "poisson") and row["requests"] > 10:
        asked = level.load * SENT_ENOUGH
        if row["sent_per_s"] < asked:
            found.append(f"{model} {level}: only {row['sent_per_s']:.2f} requests a second were sent")
    if level.arrival != "closed" and driven.late > LATE:
        found.append(f"{model} {level}: requests were sent {driven.late * 1000:.0f} ms after their time at p99")
    if abs(driven.watch.drift) > 0.1:
        found.append(f"{model} {level}: this clock was set by {driven.watch.drift:+.2f} s meanwhile")
    return found


def _summary(models: list[str], rows: list[dict[str, Any]], doubts: list[str]) -> Summary:
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    best = {model: max(of[model], key=lambda row: row["output_tokens_per_s"]) for model in models}
    knees = {model: of[model][index]["level"] for model in models if (index := knee(of[model])) is not None}
    return {
        "models": ", ".join(models),
        "requests": sum(row["requests"] for row in rows),
        "errors": sum(row["errors"] for row in rows),
        **{f"{m}_best_tokens_per_s": round(best[m]["output_tokens_per_s"], 1) for m in models},
        **{f"{m}_best_at": best[m]["level"] for m in models},
        **{f"{m}_knee": level for m, level in knees.items()},
        **{f"{m}_{of[m][0]['level']}_ttft_p50_ms": round(of[m][0]["ttft_p50_ms"], 1) for m in models},
        "doubts": len(doubts),
    }
