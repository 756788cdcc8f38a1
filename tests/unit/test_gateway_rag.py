"""Answers over documents through a gateway whose search is given: what is told, counted and charged of each."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_pipelines.search import Hit
from serve.gateway.api_keys import Usage, key_of, month
from serve.gateway.app import Gateway
from serve.gateway.asgi import answer
from serve.gateway.settings import GatewayConfig
from serve.retrieval import Documents, Found
from workbench.errors import UserError

KEY = key_of("wb-key", "o")
COWS = Found([Hit("cows#0", "Cows", "Cows give milk.", "book", 0.9, "cows")], False, 0.9)


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """One model: 5 tokens for a prompt of 7, and an error for one that ends in ``fail``."""
    if scope["path"] == "/v1/models":
        await answer(send, 200, {"data": [{"id": "m", "max_model_len": 4096}]})
        return
    body = json.loads((await receive())["body"])
    if body["messages"][-1]["content"].strip().endswith("fail"):
        raise RuntimeError("broken")
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    await answer(send, 200, {"choices": [{"index": 0, "message": {"content": "Milk [1]."}}], "usage": usage})


class House:
    """A gateway over that engine: the ``rows`` of its log, what its key has ``used``, how many ``searches`` ran."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "access.jsonl"
        self.searches = 0
        made: dict[str, Any] = {
            "store": f"sqlite:///{folder / 'gateway.db'}", "rag": {"uri": str(folder / "documents.db")},
            "log_file": self._log, "defaults": {"retries": 0, "price_per_hour": 3600},
        }  # fmt: skip
        self.gateway = Gateway(engine, GatewayConfig(**made))

    def ask(self, *questions: str, **rag: Any) -> list[httpx.Response]:
        async def work() -> list[httpx.Response]:
            await self.gateway.state.store.add(KEY)
            headers = {"Authorization": "Bearer wb-key"}
            bodies = [{"model": "m", "messages": [{"role": "user", "content": q}], "rag": rag} for q in questions]
            transport = httpx.ASGITransport(self.gateway)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
                answers = [await client.post("/v1/rag/chat/completions", json=body) for body in bodies]
                self.metrics = (await client.get("/metrics")).text
            await self.gateway.close()
            self.used: Usage = await self.gateway.state.store.usage(KEY.id, month(time.time()))
            return answers

        return asyncio.run(work())

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], House]:
    """A gateway whose search finds, or raises, what is given."""

    def made(found: Any) -> House:
        house = House(tmp_path)

        def find(*_: Any) -> Any:
            house.searches += 1
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(Documents, "find", find)
        return house

    return made


def test_wordings_are_charged_also_where_no_model_answers(house: Callable[[Any], House]) -> None:
    weak = house(Found([], True, 0.1))
    [told] = weak.ask("Why?", queries=2)
    assert told.json()["rag"]["status"] == "not in the documents"
    assert (weak.used.requests, weak.used.prompt_tokens) == (1, 12) and weak.used.cost > 0
    [row] = weak.rows()
    assert (row["served"], row["side_tokens"]) == ("", 12)
    assert 'workbench_tokens_total{kind="side",model="none",owner="o"} 12.0' in weak.metrics


def test_nothing_is_charged_where_no_engine_worked(house: Callable[[Any], House]) -> None:
    weak = house(Found([], True, 0.1))
    weak.ask("Why?")
    assert weak.used == Usage()


def test_passages_without_a_model_are_no_answer_of_one(house: Callable[[Any], House]) -> None:
    broken = house(COWS)
    [told] = broken.ask("Why does it fail")
    assert told.status_code == 200 and "x-served-model" not in told.headers
    assert told.json()["rag"]["status"] == "no model" and told.json()["sources"][0]["id"] == "cows#0"
    [row] = broken.rows()
    assert (row["served"], row["error"]) == ("", "engine_unavailable")
    assert 'outcome="ok"' not in broken.metrics


def test_a_mode_that_the_documents_lack_is_the_clients_error_and_no_fault_of_theirs(
    house: Callable[[Any], House],
) -> None:
    dense = house(UserError("mode: 'documents' in /srv/documents.db has no index of words"))
    for refused in dense.ask(*["Why?"] * 4, mode="keywords"):
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rag.mode")
        assert "/srv" not in refused.text
    assert dense.searches == 4


def test_documents_that_are_down_are_left_alone_after_three_faults(house: Callable[[Any], House]) -> None:
    down = house(UserError("uri: no Milvus server answers at http://milvus:19530"))
    answers = down.ask(*["Why?"] * 4)
    assert {told.json()["rag"]["status"] for told in answers} == {"no documents"}
    assert {told.headers["x-served-model"] for told in answers} == {"m"}
    assert down.searches == 3
