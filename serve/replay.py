"""Send recorded requests again, to another model or another version, and compare answers and times.

    workbench serve replay folder=/srv/workbench/requests model=tuned-2

The record must hold texts (``gateway.record.text``), which are redacted, so the prompts are not letter for letter what
was asked. Sampling is as the client asked for; ``temperature=0`` makes answers comparable.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from serve.endpoint import DEFAULT_URL, choose_model, open_client, served_models
from serve.gateway.record import read_rows
from serve.intervals import estimate
from serve.similarity import rouge_l
from workbench.config import Config, InputPath, OutputPath
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

PATHS = {"/v1/chat/completions", "/v1/completions"}
WORST = 20


class ReplayConfig(Config):
    """Which requests, to whom."""

    folder: InputPath = Field(description="Folder of the gateway's record")
    model: str | None = Field(default=None, description="Model to ask; default: each request's own")
    of_model: str = Field(default="", description="Only requests that this model answered, or failed to")
    base_url: str = Field(default=DEFAULT_URL, description="OpenAI-compatible endpoint")
    api_key_file: OutputPath | None = Field(default=None, description="File of the API key; default as for 'ask'")
    limit: int = Field(default=200, ge=1, description="The newest so many requests")
    concurrency: int = Field(default=4, ge=1, description="Requests in flight")
    temperature: float | None = Field(default=None, ge=0, description="Instead of the recorded one")
    failed: bool = Field(default=False, description="Only requests that failed then: does an incident come back?")
    timeout: float = Field(default=120.0, gt=0, description="Seconds for one request")


@dataclass
class Again:
    """A recorded request and what it came to this time."""

    row: dict[str, Any]
    answer: str = ""
    error: str = ""
    first_token_ms: float | None = None
    total_ms: float = 0.0
    completion_tokens: int = 0


def run(config: ReplayConfig, run: Run) -> Summary:
    """Replay, and report how alike the answers are and how the times differ, pair by pair."""
    rows = [
        row for row in read_rows(config.folder, "requests")
        if row["path"] in PATHS and row["body"] and config.of_model in ("", row["served"] or row["asked"])
        and (not config.failed or row["error"])
    ][-config.limit :]  # fmt: skip
    if not rows:
        raise UserError(f"folder: no request with its text in {config.folder}: set gateway.record.text=true, and ask")
    run.input("record", config.folder)
    with open_client(config.base_url, config.api_key_file, config.timeout) as client:
        served = served_models(client)
        if config.model:
            choose_model(served, config.model)
        key = client.api_key
    results = asyncio.run(replay(rows, config, key))
    good = [again for again in results if not again.error]
    if not good:
        raise Failure(f"none of {len(results)} requests succeeded: {results[0].error}")
    pairs = [again for again in good if again.row["answer"] and not again.row["error"]]
    alike = [rouge_l(again.row["answer"], again.answer) for again in pairs]
    slower = [again.total_ms - again.row["total_ms"] for again in pairs]
    ids = [again.row["request_id"] for again in pairs]
    worst = sorted(zip(alike, pairs, strict=True), key=lambda pair: pair[0])[:WORST]
    run.report.table(
        "Answers that differ most",
        [{"ROUGE-L": f"{score:.3f}", "then": a.row["served"], "answer then": a.row["answer"], "answer now": a.answer,
          "ms then": a.row["total_ms"], "ms now": round(a.total_ms, 1)} for score, a in worst],
    )  # fmt: skip
    errors = [{"request": a.row["request_id"], "then": a.row["error"], "now": a.error} for a in results if a.error]
    run.report.table("Requests that failed now", errors)
    _figure(run, pairs)
    summary: Summary = {
        "requests": len(results),
        "failed_now": len(errors),
        "failed_then": sum(bool(a.row["error"]) for a in results),
        "compared": len(pairs),
    }
    if pairs:
        same = [float(again.row["answer"] == again.answer) for again in pairs]
        for name, values in (("same_answer", same), ("rouge_l", alike), ("slower_ms", slower)):
            found = estimate(values, ids)
            summary |= {name: round(found.mean, 4), f"{name}_95": f"{found.low:.4g} to {found.high:.4g}"}
            run.say(f"{name}: {found}")
    return summary


async def replay(rows: list[dict[str, Any]], config: ReplayConfig, key: str) -> list[Again]:
    """All requests, at most ``concurrency`` at once, in the order of the record."""
    import openai

    places = asyncio.Semaphore(config.concurrency)
    async with openai.AsyncOpenAI(
        base_url=config.base_url, api_key=key, timeout=config.timeout, max_retries=0
    ) as client:

        async def one(row: dict[str, Any]) -> Again:
            async with places:
                return await _once(client, row, config)

        return list(await asyncio.gather(*(one(row) for row in rows)))


async def _once(client: Any, row: dict[str, Any], config: ReplayConfig) -> Again:
    import openai

    again = Again(row)
    body = json.loads(row["body"]) | {"stream": True, "stream_options": {"include_usage": True}}
    body["model"] = config.model or body.get("model")
    if config.temperature is not None:
        body["temperature"] = config.temperature
    begun = time.perf_counter()
    try:
        stream = await client.post(
            row["path"].removeprefix("/v1"), body=body, cast_to=object, stream=True,
            stream_cls=openai.AsyncStream[object],
        )  # fmt: skip
        async for chunk in stream:
            for choice in chunk.get("choices") or []:
                text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                if text and again.first_token_ms is None:
                    again.first_token_ms = 1000 * (time.perf_counter() - begun)
                again.answer += text if not choice.get("index") else ""
            again.completion_tokens = (chunk.get("usage") or {}).get("completion_tokens", again.completion_tokens)
    except openai.APIError as error:
        again.error = f"{type(error).__name__}: {error}"
    again.total_ms = 1000 * (time.perf_counter() - begun)
    return again


def _figure(run: Run, pairs: list[Again]) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(
        x=[a.row["total_ms"] for a in pairs], y=[a.total_ms for a in pairs], mode="markers",
        text=[a.row["request_id"] for a in pairs],
    )  # fmt: skip
    most = max([a.total_ms for a in pairs] + [a.row["total_ms"] for a in pairs], default=1)
    figure.add_scatter(x=[0, most], y=[0, most], mode="lines", name="as long as then")
    figure.update_layout(xaxis_title="ms then", yaxis_title="ms now")
    run.report.figure("Whole answers, then and now", figure)
