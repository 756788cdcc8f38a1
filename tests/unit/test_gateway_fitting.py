"""Passages cut to a context: by the engine's count, which is one token a byte here, or by a guess without one."""

import asyncio
from typing import Any

import orjson
import pytest

from data_pipelines.search import Hit
from serve.citations import TEMPLATE, prompt
from serve.gateway import fitting
from serve.gateway.api_keys import ApiKey
from serve.gateway.errors import ApiError
from serve.gateway.exchange import Exchange

HITS = [Hit(f"{n}#0", f"Title {n}", "word " * 400, "book", 0.9) for n in range(3)]
COUNTED = 1000
"""The engine's context; its listing does not tell it."""


class Lines:
    """One model with a context of so many tokens."""

    def __init__(self, context: int) -> None:
        self._card = {"max_model_len": context} if context != COUNTED else {}

    async def cards(self) -> dict[str, Any]:
        return {"m": self._card}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that an engine was asked to count; it refuses those that pass ``COUNTED`` tokens."""
    asked: list[str] = []

    async def relay(lines: Any, exchange: Exchange, send: Any) -> None:
        text = (exchange.body or {})["prompt"]
        asked.append(text)
        exchange.status = 200 if len(text.encode()) <= COUNTED else 400
        told = {"count": len(text.encode()), "max_model_len": COUNTED}
        await send({"type": "http.response.body", "body": orjson.dumps(told)})

    monkeypatch.setattr(fitting, "relay", relay)
    return asked


def fit(context: int, question: str = "Why?", **body: Any) -> str:
    messages = [{"role": "user", "content": question}]
    exchange = Exchange("r", "t", "p", "/v1/rag/chat/completions", ApiKey("k", "d", "o"), asked="m")
    exchange.body = {"messages": messages, **body}
    fits = fitting.Fitting(Lines(context))  # type: ignore[arg-type]
    return asyncio.run(fits.fitted(exchange, lambda b, count: prompt(TEMPLATE, question, HITS, b, count)))


def test_what_is_short_for_its_context_is_whole_and_not_counted(counted: list[str]) -> None:
    assert fit(10_000).count("word") == 1200
    assert not counted


def test_what_is_too_long_is_cut_to_nearly_all_of_the_room(counted: list[str]) -> None:
    text = fit(1000, max_tokens=100)
    room = 1000 - 100 - fitting.TEMPLATE_TOKENS - fitting.MESSAGE_TOKENS
    assert 0.8 * room < len(text.encode()) <= room
    assert [f"[{n}] Title {n - 1}" in text for n in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(("context", "body"), [(300, {}), (1000, {"max_tokens": 900}), (1000, {"question": "x" * 950})])
def test_no_room_for_any_passage_is_refused(counted: list[str], context: int, body: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="leave no room for the documents") as refused:
        fit(context, **body)
    assert refused.value.status == 400


@pytest.mark.parametrize("tools", [5, True, "search", {"name": "search"}])
def test_tools_that_are_no_list_are_refused(counted: list[str], tools: Any) -> None:
    with pytest.raises(ApiError, match="tools is a list") as refused:
        fit(10_000, tools=tools)
    assert (refused.value.status, refused.value.param) == (400, "tools")


def test_an_engine_that_counts_nothing_is_guessed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def relay(lines: Any, exchange: Exchange, send: Any) -> None:
        raise ApiError(404, "no such path", "not_found")

    monkeypatch.setattr(fitting, "relay", relay)
    assert 0.7 * 800 < len(fit(999, max_tokens=100)) / 3 <= 999
