"""The gateway as the outermost layer of a FastAPI application, as it is of Ray's ingress."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.gateway.api_keys import key_of, open_store
from serve.gateway.app import Gateway
from serve.gateway.quota import Quota
from serve.gateway.settings import GatewayConfig

HEADERS = {"Authorization": "Bearer wb-key"}


class Ingress:
    """An application with the layers that Ray's has, and what it has seen."""

    def __init__(self, settings: GatewayConfig, adapters: tuple[str, ...]) -> None:
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = 0
        self.started = asyncio.Event()
        app = self.app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            card = {"metadata": {"max_request_context_length": 64}}
            return {"object": "list", "data": [{"id": name, **card} for name in ("tiny", *adapters)]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            text = body["messages"][-1]["content"]
            if text == "fail":
                raise RuntimeError("inside")
            if text.startswith("refuse"):
                return JSONResponse({"error": {"message": "no"}}, int(text.split()[1]))
            if "echo" in text:
                error = {"message": f"no: {[body]}", "code": 400}
                if body.get("stream"):
                    return StreamingResponse(self._stream(text, error), media_type="text/event-stream")
                return JSONResponse({"error": error}, 400)
            if text == "nap":
                await asyncio.sleep(0.5)
            if text == "wait":
                self.started.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
            if not body.get("stream"):
                return JSONResponse({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 1,
                                     "completion_tokens": 1}})  # fmt: skip
            return StreamingResponse(self._stream(text), media_type="text/event-stream")

        @app.post("/v1/audio/transcriptions")
        async def transcribe(request: Request) -> Response:
            form = await request.form()
            file = form["file"]
            assert not isinstance(file, str)
            self.bodies.append({**form, "file": await file.read(), "name": file.filename})
            return JSONResponse({"text": "spoken"})

        async def passed(request: Request, call_next: Any) -> Response:
            return await call_next(request)  # type: ignore[no-any-return]

        app.add_middleware(BaseHTTPMiddleware, dispatch=passed)
        base = dict.fromkeys(adapters, "tiny")
        app.add_middleware(Gateway, settings=settings, healthy=lambda model: model == "tiny", base=base)

    async def _stream(self, text: str, error: dict[str, Any] | None = None) -> AsyncIterator[str]:
        """A chunk a word; an ``error`` in place of the word ``secret``."""
        for word in text.split():
            if error and word == "secret":
                yield f"data: {json.dumps({'error': error})}\n\n"
                break
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n"
            if word == "hang":
                self.started.set()
            try:
                await asyncio.sleep(60 if word == "hang" else 0)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        yield "data: [DONE]\n\n"


def rows(log: Path) -> list[dict[str, Any]]:
    """The lines of a log of requests."""
    return [json.loads(line) for line in log.read_text().splitlines()]


async def made(tmp_path: Path, adapters: tuple[str, ...] = (), **more: Any) -> tuple[Ingress, httpx.AsyncClient]:
    settings = GatewayConfig(store=f"sqlite:///{tmp_path / 'gateway.db'}", **more)
    await open_store(settings.store).add(key_of("wb-key", "operator"))
    ingress = Ingress(settings, adapters)
    transport = httpx.ASGITransport(ingress.app, raise_app_exceptions=False)
    return ingress, httpx.AsyncClient(transport=transport, base_url="http://x", headers=HEADERS)


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def test_what_the_application_answers_comes_through_with_its_ids(tmp_path: Path) -> None:
    async def work() -> None:
        ingress, client = await made(tmp_path)
        whole = await client.post("/v1/chat/completions", json=ask("hello", top_k=3))
        assert whole.json()["choices"][0]["message"]["content"] == "hello"
        assert ingress.bodies[0]["request_id"] == whole.headers["x-request-id"] == ingress.headers[0]["x-request-id"]
        assert ingress.bodies[0]["top_k"] == 3
        assert "authorization" not in ingress.headers[0]
        stream = await client.post("/v1/chat/completions", json=ask("a b c", stream=True))
        assert stream.text.count("data: ") == 4
        listed = (await client.get("/v1/models")).json()["data"]
        assert listed == [{"id": "tiny", "metadata": {"max_request_context_length": 64}}]

    asyncio.run(work())


def test_a_client_that_leaves_after_the_whole_answer_has_not_left_it(tmp_path: Path) -> None:
    async def work() -> None:
        _, client = await made(tmp_path, log_file=tmp_path / "log")
        for stream in (False, True):
            await client.post("/v1/chat/completions", json=ask("hello", stream=stream))

    asyncio.run(work())
    assert [row["error"] for row in rows(tmp_path / "log")] == ["", ""]


def test_a_store_that_cannot_count_refuses_and_costs_no_engine_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked(*_: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    async def work() -> None:
        ingress, client = await made(tmp_path)
        monkeypatch.setattr(Quota, "admit", locked)
        answer = await client.post("/v1/chat/completions", json=ask("hello"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "5" and ingress.bodies == []

    asyncio.run(work())


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_refusal_of_the_gateway_itself_is_not_told_to_the_client(tmp_path: Path, status: int) -> None:
    async def work() -> None:
        _, client = await made(tmp_path, defaults={"retries": 0})
        answer = await client.post("/v1/chat/completions", json=ask(f"refuse {status}"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")

    asyncio.run(work())


@pytest.mark.parametrize("path", ["/docs", "/openapi", "/v1/unknown", "/v1/completions/", "/redoc"])
def test_a_path_that_the_gateway_does_not_know_does_not_reach_the_application(tmp_path: Path, path: str) -> None:
    async def work() -> None:
        ingress, client = await made(tmp_path)
        for method in ("GET", "POST", "DELETE"):
            answer = await client.request(method, path, json=ask("hello"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert ingress.bodies == []

    asyncio.run(work())


def test_an_application_that_breaks_is_an_engine_that_failed(tmp_path: Path) -> None:
    async def work() -> None:
        _, client = await made(tmp_path, defaults={"retries": 0})
        answer = await client.post("/v1/chat/completions", json=ask("fail"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert "inside" not in answer.text

    asyncio.run(work())


@pytest.mark.parametrize(("text", "stream"), [("wait", False), ("a hang b", True)])
def test_work_that_takes_too_long_is_cancelled_in_the_application(tmp_path: Path, text: str, stream: bool) -> None:
    async def work() -> None:
        ingress, client = await made(tmp_path, defaults={"retries": 0, "timeout": 0.5, "first_token_timeout": 0.2})
        answer = await client.post("/v1/chat/completions", json=ask(text, stream=stream))
        if stream:
            assert answer.text.startswith("data: ") and '"code":"timeout"' in answer.text
        else:
            assert answer.json()["error"]["code"] == "timeout"
        assert ingress.cancelled == 1

    asyncio.run(work())


@pytest.mark.parametrize(("text", "stream"), [("wait", False), ("a hang b", True)])
def test_work_for_a_client_that_leaves_is_cancelled_in_the_application(tmp_path: Path, text: str, stream: bool) -> None:
    async def work() -> None:
        ingress, _ = await made(tmp_path)
        body = json.dumps(ask(text, stream=stream)).encode()
        given = False

        async def receive() -> Any:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await ingress.started.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "root_path": "",
            "query_string": b"", "headers": [(b"authorization", b"Bearer wb-key")], "http_version": "1.1",
        }  # fmt: skip
        await asyncio.wait_for(ingress.app(scope, receive, send), 20)
        assert ingress.cancelled == 1

    asyncio.run(work())


@pytest.mark.parametrize(("text", "stream"), [("echo secret 'diagnosis'\nü", False), ("secret diagnosis echo", True),
                                              ("echo secret diagnosis", True)])  # fmt: skip
def test_what_an_engine_echoes_of_a_request_is_in_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, stream: bool
) -> None:
    log = tmp_path / "access.jsonl"

    async def work() -> httpx.Response:
        _, client = await made(tmp_path, log_file=log)
        return await client.post("/v1/chat/completions", json=ask(text, stream=stream))

    answer = asyncio.run(work())
    assert "no: [" in answer.text  # its client is told
    [row] = rows(log)
    assert row["error"] in ("engine_refused", "engine_failed") and row["reason"].startswith("no: [")
    assert "secret" not in log.read_text() + caplog.text
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("asked", ["tiny", "voice"])
def test_a_form_goes_to_the_model_of_its_route(tmp_path: Path, asked: str) -> None:
    async def work() -> None:
        ingress, client = await made(tmp_path, routes={"voice": {"tiny": 1.0}})
        answer = await client.post(
            "/v1/audio/transcriptions",
            data={"model": asked, "language": "de"},
            files={"file": ("a.wav", b"\0\r\n--\xff")},
        )
        assert (answer.status_code, answer.headers["x-served-model"]) == (200, "tiny")
        assert ingress.bodies == [{"model": "tiny", "language": "de", "file": b"\0\r\n--\xff", "name": "a.wav"}]


# Adapters


async def cost(client: httpx.AsyncClient, model: str) -> float:
    found = f'workbench_cost_total{{model="{model}",owner="operator"}} '
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(found)).removeprefix(found))


def test_a_base_and_its_adapters_are_billed_the_time_of_their_one_engine(tmp_path: Path) -> None:
    async def work() -> None:
        names = ("tiny", "polite", "terse")
        policies = {"defaults": {"price_per_hour": 3600.0}, "models": {"terse": {"price_per_hour": 7200.0}}}
        _, client = await made(tmp_path, names[1:], **policies)
        begun = time.perf_counter()
        await asyncio.gather(*(client.post("/v1/chat/completions", json=ask("nap", model=name)) for name in names))
        wall = time.perf_counter() - begun
        shares = [await cost(client, name) / price for name, price in zip(names, (1, 1, 2), strict=True)]
        assert 0.5 <= sum(shares) <= wall
        assert min(shares) > 0.1

    asyncio.run(work())


def test_an_adapter_has_the_places_and_the_breaker_of_its_base(tmp_path: Path) -> None:
    async def work() -> None:
        policy = {"concurrency": 1, "queue": 0, "retries": 0, "breaker_failures": 1}
        ingress, client = await made(tmp_path, ("polite",), models={"tiny": policy, "polite": {"retries": 0}})

        async def asked(text: str, model: str) -> Any:
            return (await client.post("/v1/chat/completions", json=ask(text, model=model))).json()

        waiting = asyncio.create_task(asked("wait", "polite"))  # it comes first, and finds the base's limits
        await ingress.started.wait()
        for model in ("tiny", "polite"):
            assert (await asked("hello", model))["error"]["code"] == "overloaded"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await asked("fail", "polite"))["error"]["code"] == "engine_unavailable"
        assert (await asked("hello", "tiny"))["error"]["code"] == "breaker_open"

    asyncio.run(work())


# Readiness


def test_readiness_is_what_the_engines_own_health_says(tmp_path: Path) -> None:
    async def work() -> None:
        _, client = await made(tmp_path)
        told = (await client.get("/ready")).json()
        assert told["status"] == "ready" and told["models"]["tiny"]["ready"]
        assert told.keys() == {"status", "store", "models"}

    asyncio.run(work())
