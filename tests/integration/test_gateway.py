"""The gateway as a process of its own before engines that misbehave on purpose, seen through HTTP."""

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateways import Server, bad_engine, free_port, gateway
from kills import ROUNDS
from typer.testing import CliRunner

from serve.gateway.api_keys import Usage, key_of, month, open_store
from serve.gateway.app import RELAYED
from serve.gateway.keys_cli import keys_app
from serve.gateway.metrics import SHARED_FOLDER
from serve.gateway.record import read_rows

KEYS: dict[str, dict[str, Any]] = {
    "operator": {},
    "limited": {"models": ["m", "ab"]},
    "slow": {"requests_per_minute": 3},
    "small": {"tokens_per_minute": 10},
    "poor": {"budget": 0.001},
    "leaving": {},
}
FIRST_TOKEN, WHOLE = 0.5, 1.0
LONG = 20.0
"""Less than a client waits, and more than anything here takes on a crowded machine."""


def settings(engine: Server, second: Server, store: str, folder: Path) -> dict[str, Any]:
    def at(server: Server) -> dict[str, str]:
        return {"base_url": f"{server.url}/v1", "model": "engine"}

    patient = {"breaker_failures": 10_000}
    nowhere = {"base_url": f"http://127.0.0.1:{free_port()}/v1"}
    return {
        "store": store,
        "log_file": str(folder / "access.jsonl"),
        "max_body_mb": 1,
        "upstreams": {
            **{name: at(engine) for name in ("m", "hasty", "single", "twin", "narrow", "flaky", "priced")},
            "mortal": at(second), "dead": nowhere, "lonely": nowhere,
        },
        "models": {
            "m": patient,
            "hasty": {**patient, "first_token_timeout": FIRST_TOKEN, "timeout": WHOLE},
            "single": {**patient, "timeout": WHOLE, "concurrency": 1, "queue": 0},
            "narrow": {"concurrency": 2, "queue": 2},
            "flaky": {"breaker_failures": 2, "breaker_seconds": 1.0, "retries": 0},
            "priced": {"price_per_hour": 3.6e6, "watts": 3600},
            "mortal": {"breaker_failures": 2, "breaker_seconds": 0.3, "fallback": ["m"]},
            "dead": {"fallback": ["lonely", "m"], "retries": 0},
        },
        "routes": {"ab": {"m": 0.5, "twin": 0.5}},
        "record": {"folder": str(folder / "record"), "text": True, "flush_seconds": 0.2},
    }  # fmt: skip


class House:
    """Two engines and the gateway before them."""

    def __init__(self, engine: Server, second: Server, server: Server, store: str, folder: Path) -> None:
        self.engine, self.second, self.server, self.store, self.folder = engine, second, server, store, folder

    def client(self, owner: str = "operator") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=f"wb-{owner}", max_retries=0, timeout=30)

    def post(self, path: str = "/v1/chat/completions", *, owner: str = "operator", **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer wb-{owner}", **kwargs.pop("headers", {})}
        return httpx.post(self.server.url + path, headers=headers, timeout=60, **kwargs)

    def chat(self, text: str = "hello", model: str = "m", owner: str = "operator", **more: Any) -> httpx.Response:
        return self.post(owner=owner, json={"model": model, "messages": [{"role": "user", "content": text}], **more})

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "access.jsonl").read_text().splitlines()]

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.server.url}/metrics", headers={"Authorization": "Bearer wb-operator"}, timeout=60).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
            if line.startswith(f"workbench_{name}{{") and all(f'{k}="{v}"' for k, v in labels.items())
            and all(f'{k}="{v}"' in line for k, v in labels.items())
        )  # fmt: skip


def add_keys(store: str) -> None:
    async def work() -> None:
        opened = open_store(store)
        for owner, limits in KEYS.items():
            await opened.add(key_of(f"wb-{owner}", owner, **limits))
        await opened.close()

    asyncio.run(work())


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("gateway")
    store = f"sqlite:///{folder / 'gateway.db'}"
    add_keys(store)
    with (
        bad_engine() as engine,
        bad_engine() as second,
        gateway(settings(engine, second, store, folder), folder / "log") as server,
    ):
        yield House(engine, second, server, store, folder)


def until(true: Callable[[], Any], seconds: float = LONG) -> float:
    """Wait until it is true; how long that took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not come true"
        time.sleep(0.02)
    return time.monotonic() - begun


def error_of(answer: httpx.Response) -> str:
    """The code of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["code"])


# Keys


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/docs", "/openapi.json",
                                  "/metrics", "/v1/feedback", "/", "/seen"])  # fmt: skip
@pytest.mark.parametrize("key", [None, "wrong", "wb-"])
def test_a_wrong_key_costs_no_engine_work(house: House, path: str, key: str | None) -> None:
    before = house.engine.seen()["requests"]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for method in ("GET", "POST", "OPTIONS"):
        answer = httpx.request(method, house.server.url + path, headers=headers, json={"model": "m"}, timeout=60)
        assert (answer.status_code, error_of(answer)) == (401, "invalid_api_key")
    assert house.engine.seen()["requests"] == before


def test_the_operators_key_does_not_go_to_the_engine(house: House) -> None:
    house.chat()
    assert "authorization" not in house.engine.seen()["headers"]


def test_a_key_sees_and_uses_its_own_models_only(house: House) -> None:
    client = house.client("limited")
    assert {model.id for model in client.models.list()} == {"m", "ab"}
    assert house.chat(owner="limited").status_code == 200
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model="twin", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("twin")
    assert error_of(house.chat(model="absent")) == "model_not_found"


def test_requests_a_minute_hold_over_processes_and_restarts(house: House) -> None:
    answers = [house.chat(owner="slow") for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
    refused = house.chat(owner="slow")
    assert (refused.status_code, error_of(refused)) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    with gateway(settings(house.engine, house.second, house.store, house.folder)) as second:
        other = House(house.engine, house.second, second, house.store, house.folder)
        assert other.chat(owner="slow").status_code == 429
        with pytest.raises(openai.RateLimitError):
            other.client("slow").completions.create(model="m", prompt="hello")


def test_tokens_a_minute_count_what_the_engine_counted(house: House) -> None:
    assert house.chat(owner="small").status_code == 200  # 12 tokens, 10 allowed
    until(lambda: house.chat(owner="small").status_code == 429)
    assert "tokens a minute" in house.chat(owner="small").json()["error"]["message"]


def test_a_budget_that_is_spent_ends_the_month(house: House) -> None:
    assert house.chat("slow", model="priced", owner="poor").status_code == 200
    until(lambda: house.chat(owner="poor").status_code == 429)
    refused = house.chat(owner="poor")
    assert error_of(refused) == "insufficient_quota"
    assert int(refused.headers["retry-after"]) <= 31 * 86400
    assert house.metric("cost_total", owner="poor") > 0.001
    assert house.metric("energy_wh_total", owner="poor") > 0.9  # a second at 3,600 W


def test_keys_are_added_listed_and_revoked_by_command(house: House) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(keys_app, [*arguments, "--store", house.store])
        assert result.exit_code == 0, result.output
        return result.stdout

    made = json.loads(run("add", "zoe", "--model", "m", "--requests", "100", "--json"))
    client = openai.OpenAI(base_url=f"{house.server.url}/v1", api_key=made["key"], max_retries=0)
    assert client.completions.create(model="m", prompt="hello").usage
    until(lambda: next(row for row in json.loads(run("list", "--json")) if row["owner"] == "zoe")["requests"] == 1)
    assert made["key"] not in run("list") and "zoe" in run("list")
    run("revoke", made["id"])
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert CliRunner().invoke(keys_app, ["revoke", "absent", "--store", house.store]).exit_code != 0


# OpenAI's endpoints


def test_the_official_client_works_unchanged(house: House) -> None:
    client = house.client()
    whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert whole.choices[0].message.content == "one two three four five"
    assert whole.usage is not None and whole.usage.completion_tokens == 5
    assert client.embeddings.create(model="m", input="x").data[0].embedding == [1.0, 0.0]
    assert client.models.retrieve("m").id == "m"
    stream = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hello"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three four five"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 12


def test_a_stream_that_did_not_ask_for_usage_gets_none_and_is_counted_all_the_same(house: House) -> None:
    before = house.metric("tokens_total", kind="completion")
    stream = house.client().chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    assert all(chunk.choices for chunk in stream)
    until(lambda: house.metric("tokens_total", kind="completion") == before + 5)


def test_what_vllm_accepts_and_openai_does_not_passes_through(house: House) -> None:
    house.chat(guided_regex="a+", chat_template_kwargs={"thinking": False}, min_p=0.1)
    body = house.engine.seen()["body"]
    assert (body["guided_regex"], body["chat_template_kwargs"], body["min_p"]) == ("a+", {"thinking": False}, 0.1)


def test_an_engines_refusal_is_the_clients_error_and_no_fault(house: House) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            house.client().chat.completions.create(
                model="flaky", messages=[{"role": "user", "content": "refuse"}], stream=stream
            )
    assert house.chat(model="flaky").status_code == 200


# Faults


@pytest.mark.parametrize(("text", "stream", "limit"), [("stuck", True, FIRST_TOKEN), ("role", True, FIRST_TOKEN),
                                                       ("stuck", False, WHOLE)])  # fmt: skip
def test_a_stuck_engine_is_given_up_in_time_and_its_place_freed(
    house: House, text: str, stream: bool, limit: float
) -> None:
    begun = time.monotonic()
    answer = house.chat(text, model="hasty", stream=stream)
    assert (answer.status_code, error_of(answer)) == (504, "timeout")
    assert limit <= time.monotonic() - begun < LONG
    assert answer.headers["retry-after"]
    until(lambda: house.engine.seen()["running"] == 0)


def test_a_fault_before_the_first_token_is_tried_again_unseen(house: House) -> None:
    for stream in (False, True):
        assert house.chat(f"once {stream}", stream=stream).status_code == 200
    until(lambda: [row["attempts"] for row in house.log()[-2:]] == [2, 2])  # a row is written after its answer


def test_a_fault_that_stays_is_told_without_its_inside(house: House) -> None:
    answer = house.chat("fail")
    assert (answer.status_code, error_of(answer)) == (503, "engine_unavailable")
    assert "CUDA" not in answer.text
    assert "CUDA" in (house.folder / "log").read_text()


@pytest.mark.parametrize("text", ["cut", "silent"])
def test_a_stream_that_is_cut_ends_with_an_error_not_as_if_it_were_whole(house: House, text: str) -> None:
    stream = house.client().chat.completions.create(
        model="m", messages=[{"role": "user", "content": text}], stream=True
    )
    got = []
    with pytest.raises(openai.APIError, match="cut off"):
        for chunk in stream:
            got.append(chunk.choices[0].delta.content)
    assert "".join(got).startswith("one two ")
    until(lambda: house.log()[-1]["error"] == "answer_cut")


def test_another_model_answers_for_one_that_cannot(house: House) -> None:
    answer = house.chat(model="dead")
    assert answer.status_code == 200
    assert (answer.headers["x-served-model"], answer.headers["x-fallback-from"]) == ("m", "dead")
    assert house.metric("fallbacks_total", model="dead", served="m") >= 1
    refused = house.chat(model="lonely")
    assert (refused.status_code, error_of(refused)) == (503, "engine_unavailable")


def test_a_fallback_is_no_way_round_a_keys_models(house: House) -> None:
    add = key_of("wb-dead-only", "dead-only", models=["dead"])
    asyncio.run(open_store(house.store).add(add))
    assert house.chat(model="dead", owner="dead-only").status_code == 503


def test_a_breaker_spares_a_broken_engine_and_closes_when_it_mends(house: House) -> None:
    assert [house.chat("broken", model="flaky").status_code for _ in range(2)] == [503, 503]
    before = house.engine.seen()["requests"]
    refused = house.chat(model="flaky")
    assert error_of(refused) == "breaker_open"
    assert house.engine.seen()["requests"] == before
    assert house.metric("breaker_open", model="flaky") == 1
    httpx.post(f"{house.engine.url}/mend")
    until(lambda: house.chat("broken", model="flaky").status_code == 200)
    assert house.metric("breaker_open", model="flaky") == 0


def test_past_its_queue_a_model_refuses_at_once_and_every_request_is_answered(house: House) -> None:
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(house.chat, "held", "narrow") for _ in range(12)]
        until(lambda: sum(each.done() for each in asked) == 8)  # before any of the others has its answer
        assert (house.metric("running", model="narrow"), house.metric("waiting", model="narrow")) == (2, 2)
        release(house, asked)
        answers = [each.result() for each in asked]
    assert Counter(answer.status_code for answer in answers) == {200: 4, 503: 8}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    assert house.metric("running", model="narrow") == house.metric("waiting", model="narrow") == 0


def release(house: House, asked: list[Any]) -> None:
    """Let the engine answer until all are answered."""

    def done() -> bool:
        httpx.post(f"{house.engine.url}/release")
        return all(each.done() for each in asked)

    until(done)


def test_a_client_that_leaves_frees_its_place_at_once(house: House) -> None:
    aborted = house.engine.seen()["aborted"]
    body = {"model": "narrow", "messages": [{"role": "user", "content": "long"}], "stream": True}
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            headers = {"Authorization": "Bearer wb-leaving"}
            stream = httpx.stream("POST", f"{house.server.url}/v1/chat/completions", json=body, headers=headers)
            assert stack.enter_context(stream).status_code == 200
        assert house.engine.seen()["running"] == 2
    until(lambda: house.engine.seen()["aborted"] == aborted + 2)
    assert house.chat(model="narrow").status_code == 200
    until(lambda: house.metric("requests_total", owner="leaving", outcome="client_gone") == 2)
    until(lambda: house.metric("tokens_total", owner="leaving", kind="completion") > 0)  # it pays for what it took


def test_a_client_that_leaves_the_queue_takes_no_place(house: House) -> None:
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(house.chat, "held", "narrow") for _ in range(2)]
        until(lambda: house.metric("running", model="narrow") == 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{house.server.url}/v1/completions", json={"model": "narrow", "prompt": "hello"},
                headers={"Authorization": "Bearer wb-operator"}, timeout=0.2,
            )  # fmt: skip
        until(lambda: house.metric("waiting", model="narrow") == 0)
        release(house, held)
        assert [each.result().status_code for each in held] == [200, 200]


def test_a_client_that_reads_slowly_or_sends_slowly_holds_nobody_else(house: House) -> None:
    port = httpx.URL(house.server.url).port
    assert port is not None
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "long"}], "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wb-operator\r\ncontent-length: "
    with contextlib.ExitStack() as stack:
        for sent in (head + str(len(body)).encode() + b"\r\n\r\n" + body, head + b"100\r\n\r\n{", b"POST /v1/"):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.sendall(sent)
        time.sleep(0.1)
        assert all(house.chat(stream=True).status_code == 200 for _ in range(5))


def test_a_client_that_never_reads_leaves_its_place(house: House) -> None:
    port = httpx.URL(house.server.url).port
    assert port is not None
    body = json.dumps({"model": "single", "messages": [{"role": "user", "content": "flood"}], "stream": True}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wb-operator\r\n"
            b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        until(lambda: house.metric("running", model="single") == 1)
        assert error_of(house.chat(model="single")) == "overloaded"
        until(lambda: house.chat(model="single").status_code == 200)  # past the time-out and a last word
    rows = [row for row in house.log() if row["asked"] == "single" and row["status"] == 200]
    assert rows[0]["error"] == "client_gone"


def test_a_killed_engine_is_fallen_back_from_and_taken_up_again(house: House) -> None:
    """Under load, over its death and its return: every request has an answer or a proper error."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = house.chat("hello", model="mortal", stream=True)
            whole = "data: [DONE]" in answer.text
            kind = answer.headers.get("x-served-model", "") if whole else error_or_cut(answer)
            outcomes[kind] += 1

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(load)
        try:
            until(lambda: outcomes["mortal"] > 10)
            house.second.kill()
            until(lambda: outcomes["m"] > 10)
            with bad_engine(httpx.URL(house.second.url).port):
                served = outcomes["mortal"]
                recovered = until(lambda: outcomes["mortal"] > served)
                until(lambda: outcomes["mortal"] > served + 10)
        finally:
            stop.set()
    print(f"recovered {recovered:.2f} s after the engine listened again: {dict(outcomes)}")
    assert set(outcomes) <= {"mortal", "m", "answer_cut"}


def error_or_cut(answer: httpx.Response) -> str:
    """The code of an error, of the status or of the stream."""
    if answer.status_code != 200:
        return error_of(answer)
    last = [line for line in answer.text.splitlines() if line.startswith("data: ")][-1]
    return str(json.loads(last.removeprefix("data: "))["error"]["code"])


def test_readiness_tells_the_truth(house: House) -> None:
    told = httpx.get(f"{house.server.url}/ready", headers={"Authorization": "Bearer wb-operator"}, timeout=60)
    assert (told.status_code, told.json()["status"]) == (200, "degraded")  # two models are at no server
    assert not told.json()["models"]["dead"]["ready"] and told.json()["models"]["m"]["ready"]
    assert httpx.get(f"{house.server.url}/ready", timeout=60).json() == {"status": "degraded"}
    lonely = {"store": house.store, "upstreams": {"dead": {"base_url": f"http://127.0.0.1:{free_port()}"}}}
    with gateway(lonely) as server:
        assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 503
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_a_gateway_that_is_stopped_finishes_its_answers(house: House, tmp_path: Path) -> None:
    record = {"folder": str(tmp_path / "record"), "flush_seconds": 60}
    with gateway({**settings(house.engine, house.second, house.store, tmp_path), "record": record}) as server:
        other = House(house.engine, house.second, server, house.store, tmp_path)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(other.chat, "held", "m", stream=True)
            until(lambda: other.metric("running", model="m") == 1)
            server.terminate()
            until(lambda: refuses(server))
            release(other, [answer])
            assert "data: [DONE]" in answer.result().text
        assert server.process.wait(120) == -signal.SIGTERM  # of which it tells when it has drained
        assert [row["served"] for row in read_rows(tmp_path / "record", "requests")] == ["m"]  # nor was a row lost


def refuses(server: Server) -> bool:
    """Whether it takes no more connections."""
    try:
        httpx.get(f"{server.url}/health", timeout=60)
    except httpx.TransportError as error:  # one that it had taken before it stopped is cut
        return isinstance(error, httpx.ConnectError)
    return False


def test_a_gateway_that_is_killed_has_charged_what_it_answered(house: House, tmp_path: Path) -> None:
    key = key_of("wb-charged", "charged")
    asyncio.run(open_store(house.store).add(key))
    with gateway(settings(house.engine, house.second, house.store, tmp_path)) as server:
        other = House(house.engine, house.second, server, house.store, tmp_path)
        assert all(other.chat(owner="charged").status_code == 200 for _ in range(5))
        other.metric("running")  # one more turn of its loop
        server.kill()
    used = asyncio.run(open_store(house.store).usage(key.id, month(time.time())))
    assert used == Usage(5, 35, 25, 0.0)
    with sqlite3.connect(house.folder / "gateway.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


# Seen


def test_a_request_is_one_line_of_the_log_without_its_text(house: House) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "mine"}
    body = {"model": "m", "messages": [{"role": "user", "content": "marzipan hello"}], "stream": True}
    answer = house.post(json=body, headers=headers)
    engine = house.engine.seen()["headers"]
    until(lambda: house.log()[-1]["request_id"] == answer.headers["x-request-id"])
    row = house.log()[-1]
    assert (row["trace_id"], row["owner"], row["served"], row["status"]) == (trace, "operator", "m", 200)
    assert engine["traceparent"].startswith(f"00-{trace}-") and engine["x-request-id"] == row["request_id"]
    assert 0 < row["first_token_ms"] <= row["total_ms"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 5)
    assert "marzipan" not in (house.folder / "access.jsonl").read_text() + (house.folder / "log").read_text()


def test_a_scrape_of_one_replica_tells_of_all_that_live(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path / "metrics"))
    given = settings(house.engine, house.second, house.store, tmp_path)
    with gateway(given) as first, gateway(given) as second, ThreadPoolExecutor(2) as pool:
        scraped, other = (
            House(house.engine, house.second, server, house.store, tmp_path) for server in (first, second)
        )
        for each in (scraped, other):
            assert [each.chat("fail", model="flaky").status_code for _ in range(2)] == [503, 503]
        assert scraped.metric("breaker_open", model="flaky") == 1  # of two
        assert scraped.metric("requests_total", model="flaky") == 4
        lost = [pool.submit(other.chat, "held") for _ in range(2)]
        until(lambda: scraped.metric("running", model="m") == 2)
        second.kill()
        assert scraped.metric("running", model="m") == 0
        assert scraped.metric("requests_total", model="flaky") == 4
        assert all(isinstance(each.exception(), httpx.HTTPError) for each in lost)
    until(lambda: house.engine.seen()["running"] == 0)


# Learning from use


def test_a_user_stays_with_one_variant_and_judges_it(house: House) -> None:
    def served(user: str) -> httpx.Response:
        return house.chat(model="ab", owner="limited", user=user)

    first = {f"user {i}": served(f"user {i}") for i in range(16)}
    assert {answer.headers["x-served-model"] for answer in first.values()} == {"m", "twin"}
    assert {answer.headers["x-variant-of"] for answer in first.values()} == {"ab"}
    for user, answer in first.items():
        assert served(user).headers["x-served-model"] == answer.headers["x-served-model"]
    request_id = first["user 0"].headers["x-request-id"]
    kept = house.post("/v1/feedback", json={"request_id": f"chatcmpl-{request_id}", "score": 1, "comment": "good"})
    assert kept.json() == {"status": "kept", "request_id": request_id}
    until(lambda: any(row["request_id"] == request_id for row in read_rows(house.folder / "record", "feedback")))
    rows = {row["request_id"]: row for row in read_rows(house.folder / "record", "requests")}
    assert (rows[request_id]["variant_of"], rows[request_id]["user"]) == ("ab", "user 0")
    assert rows[request_id]["answer"] == "one two three four five"


@pytest.mark.parametrize(
    "body",
    [{}, {"request_id": "x"}, {"request_id": "x", "score": 2}, {"request_id": "", "score": 1},
     {"request_id": "x", "score": True}, {"request_id": "x", "score": 1, "comment": 1}],
)  # fmt: skip
def test_feedback_that_makes_no_sense_is_refused(house: House, body: dict[str, Any]) -> None:
    assert house.post("/v1/feedback", json=body).status_code == 400


# Bad input


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'{"model": "m", "prompt": "\xff"}', b'{"model": "m", "temperature": NaN}', b"{}",
     b'{"model": 5}', b'{"model": ["m"]}', b'{"model": null}', b"[" * 100_000, b'{"model": "' + b"x" * 100_000 + b'"}'],
    ids=range(12),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/feedback"])
def test_a_malformed_body_is_the_clients_error(house: House, path: str, body: bytes) -> None:
    before = house.engine.seen()["requests"]
    answer = house.post(path, content=body)
    assert 400 <= answer.status_code < 500
    assert error_of(answer) and len(answer.content) < 2000
    assert house.engine.seen()["requests"] == before


def test_a_huge_body_is_refused_whether_it_tells_its_size_or_not(house: House) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    for content in (b" " * (4 << 20), endless()):
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # closed while it still sends
            answer = house.post("/v1/completions", content=content)
            assert (answer.status_code, error_of(answer)) == (413, "body_too_large")
    assert house.chat().status_code == 200


def test_a_flood_of_headers_is_cut_off(house: House) -> None:
    port = httpx.URL(house.server.url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port)) as flood:
        with contextlib.suppress(OSError):
            flood.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
            for number in range(20_000):
                flood.sendall(f"x-{number}: {'y' * 100}\r\n".encode())
        with contextlib.suppress(OSError):
            assert b"200 OK" not in flood.recv(1000)
    assert house.chat().status_code == 200


def test_a_form_names_its_model_too(house: House) -> None:
    assert error_of(house.post("/v1/audio/transcriptions", files={"file": b"x"}, data={"model": "absent"})) == (
        "model_not_found"
    )
    broken = house.post(
        "/v1/audio/transcriptions", content=b"x", headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert broken.status_code == 400


def test_no_request_that_fits_the_schema_or_not_makes_a_500(house: House) -> None:
    """Made by schemathesis from the gateway's own description of itself."""
    import schemathesis
    from hypothesis import HealthCheck, given
    from hypothesis import settings as hypothesis_settings
    from hypothesis.errors import Unsatisfiable

    headers = {"Authorization": "Bearer wb-operator"}
    schema = schemathesis.openapi.from_url(f"{house.server.url}/openapi.json", headers=headers)
    tried: Counter[str] = Counter()
    quiet = hypothesis_settings(
        max_examples=8 * ROUNDS, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @quiet
            @given(operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                answer = case.call(headers=headers, timeout=LONG)
                tried[case.operation.path] += 1
                assert answer.status_code not in (500, 502), case.as_curl_command()
                if answer.status_code >= 400 and case.operation.path != "/ready":
                    assert answer.json()["error"]["message"]

            with contextlib.suppress(Unsatisfiable):  # no wrong request can be made of one that takes nothing
                holds()
    assert min(tried[path] for path in [*RELAYED, "/v1/feedback"]) >= 8
