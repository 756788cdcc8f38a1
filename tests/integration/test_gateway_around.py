"""The gateway beside real programs: Redis as its store, Prometheus reading it, the record replayed."""

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gateways import SECONDS, Server, bad_engine, free_port, gateway, started_program
from made_documents import made_documents

from serve import observe, replay
from serve.gateway.api_keys import Usage, key_of, month, open_store
from serve.gateway.errors import ApiError
from serve.gateway.quota import Quota
from serve.gateway.record import read_rows
from serve.observe import ObserveConfig
from serve.replay import ReplayConfig
from workbench.config import load
from workbench.errors import Failure, UserError
from workbench.runs import open_run

LONG = 30.0


def add_key(store: str, owner: str, **limits: Any) -> str:
    async def work() -> None:
        opened = open_store(store)
        await opened.add(key_of(f"wb-{owner}", owner, **limits))
        await opened.close()

    asyncio.run(work())
    return f"wb-{owner}"


def ask(server: Server, key: str, text: str = "hello", **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=LONG)


def until(true: Any) -> Any:
    deadline = time.monotonic() + LONG
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Server]:
    with bad_engine() as server:
        yield server


# Redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with started_program(command, port) as server:
        yield server


def test_keys_limits_and_use_are_shared_through_redis_and_a_dead_one_is_told(redis: Server, engine: Server) -> None:
    store = redis.url.replace("http", "redis") + "/0"
    key = add_key(store, "shared", requests_per_minute=4, tokens_per_minute=1000, budget=10.0)
    settings = {"store": store, "upstreams": {"m": {"base_url": engine.url, "model": "engine"}}}
    with gateway(settings) as first, gateway(settings) as second:
        assert [ask(server, key).status_code for server in (first, second) * 2] == [200] * 4
        refused = ask(first, key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")

        async def used() -> Usage:
            opened = open_store(store)
            try:
                return await opened.usage(key_of(key, "").id, month(time.time()))
            finally:
                await opened.close()

        until(lambda: asyncio.run(used()).completion_tokens == 20)

        async def revoke() -> bool:
            opened = open_store(store)
            try:
                return await opened.revoke(key_of(key, "").id)
            finally:
                await opened.close()

        assert asyncio.run(revoke())
        assert [ask(server, key).status_code for server in (first, second)] == [401, 401]
        redis.kill()
        dead = ask(first, key)
        assert (dead.status_code, dead.json()["error"]["code"]) == (503, "store_unavailable")
        assert httpx.get(f"{first.url}/health").status_code == 200
        assert httpx.get(f"{first.url}/ready", timeout=LONG).status_code == 503


def test_tokens_that_pass_the_limit_are_owed_in_redis(redis: Server) -> None:
    key = key_of("wb-x", "alice", tokens_per_minute=600)

    async def work() -> None:
        stores = [open_store(redis.url.replace("http", "redis") + "/0") for _ in range(2)]
        quotas = [Quota(store) for store in stores]
        assert (b"x-ratelimit-remaining-tokens", b"600") in await quotas[0].admit(key)
        for quota in quotas:
            await quota.charge(key, Usage(1, 300, 20))  # 32 s of its rate
        with pytest.raises(ApiError) as refused:
            await quotas[1].admit(key)
        wait = refused.value.retry_after or 0.0
        assert 0.0 < wait <= 4.1
        await asyncio.sleep(wait + 0.05)
        await quotas[0].admit(key)
        for store in stores:
            await store.close()

    asyncio.run(work())


# Prometheus


def test_prometheus_takes_the_files_and_finds_what_they_ask_for(
    engine: Server, tmp_path: Path, runs_root: Path
) -> None:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("prometheus is not installed")
    store = f"sqlite:///{tmp_path / 'gateway.db'}"
    key = add_key(store, "prometheus", models=["/metrics", "m"])
    nosy = add_key(store, "nosy", models=["m"])
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    settings = {
        "store": store, "upstreams": {"m": {"base_url": engine.url, "model": "engine"}},
        "defaults": {"price_per_hour": 3600, "watts": 100},
    }  # fmt: skip
    with gateway(settings) as server:
        hidden = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {nosy}"})
        assert hidden.status_code == 403  # others' use is none of its business
        folder = tmp_path / "observe"
        config = load(
            ObserveConfig, None,
            [f"url={server.url}", f"folder={folder}", f"api_key_file={tmp_path / 'key'}", "interval=1",
             f"ray_discovery={tmp_path / 'none.json'}"],
        )  # fmt: skip
        with open_run("serve", "observe", config) as run:
            observe.run(config, run)
        subprocess.run(["promtool", "check", "config", str(folder / "prometheus.yml")], check=True, capture_output=True)
        port = free_port()
        command = [
            "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with started_program(command, port) as prometheus:

            def query(expr: str) -> list[Any]:
                answer = httpx.get(f"{prometheus.url}/api/v1/query", params={"query": expr}).json()
                assert answer["status"] == "success", (expr, answer)
                return list(answer["data"]["result"])

            def counted() -> list[Any]:
                ask(server, key, stream=True)
                return query('rate(workbench_tokens_total{kind="completion"}[1m]) > 0')

            until(lambda: [each for each in query('up{job="gateway"}') if each["value"][1] == "1"])
            until(counted)
            empty = set()
            for panel in json.loads((folder / "dashboard.json").read_text())["panels"]:
                for target in panel["targets"]:
                    if not query(target["expr"]):
                        empty.add(panel["title"])
            assert not {title for title in empty if not title.startswith("vLLM")} - {
                "Share of requests that failed",  # none did
                "Open breakers, retries, fallbacks",
            }
            rules = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
            written = yaml.safe_load((folder / "alerts.yml").read_text())["groups"][0]["rules"]
            assert [rule["name"] for rule in rules] == [rule["alert"] for rule in written]
            server.kill()
            until(lambda: query('ALERTS{alertname="GatewayDown"}'))


# Replay


def test_what_was_recorded_is_asked_again_and_compared(engine: Server, tmp_path: Path, runs_root: Path) -> None:
    store, folder = f"sqlite:///{tmp_path / 'gateway.db'}", tmp_path / "record"
    key = add_key(store, "replayer")
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    upstream = {"base_url": engine.url, "model": "engine"}
    settings = {
        "store": store, "upstreams": {"m": upstream, "other": upstream, "full": upstream},
        "defaults": {"retries": 0}, "models": {"full": {"concurrency": 1, "queue": 0}},
        "record": {"folder": str(folder), "text": True, "flush_seconds": 0.1},
    }  # fmt: skip
    with gateway(settings) as server:
        for text in ("hello", "slow", "fail"):
            ask(server, key, text, stream=text == "slow")

        def replayed(*overrides: str) -> dict[str, Any]:
            config = load(
                ReplayConfig, None,
                [f"folder={folder}", f"base_url={server.url}/v1", f"api_key_file={tmp_path / 'key'}", *overrides],
            )  # fmt: skip
            with open_run("serve", "replay", config) as run:
                return replay.run(config, run)

        until(lambda: folder.is_dir() and len(list(folder.glob("requests-*"))) and three(folder))
        summary = replayed("model=other")
        assert (summary["requests"], summary["failed_then"], summary["failed_now"]) == (3, 1, 1)
        assert (summary["compared"], summary["same_answer"], summary["rouge_l"]) == (2, 1.0, 1.0)
        with pytest.raises(Failure, match="503"):
            replayed("failed=true")  # the incident comes back
        with pytest.raises(UserError, match="not served"):
            replayed("model=absent")
        with ThreadPoolExecutor(2) as pool:  # one of the two is refused
            asked = [pool.submit(ask, server, key, "slow", model="full") for _ in range(2)]
        assert sorted(each.result().status_code for each in asked) == [200, 503]
        until(lambda: len([row for row in read_rows(folder, "requests") if row["asked"] == "full"]) == 2)
        summary = replayed("of_model=full", "failed=true", "model=other")
        assert (summary["requests"], summary["failed_then"], summary["failed_now"]) == (1, 1, 0)


def three(folder: Path) -> bool:
    return len(read_rows(folder, "requests")) == 3


# Documents


def ask_documents(server: Server, key: str, text: str) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/rag/chat/completions", json=body, headers=headers, timeout=2 * SECONDS)


def test_documents_that_do_not_answer_leave_the_model_to_answer_in_time(engine: Server, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'gateway.db'}"
    key = add_key(store, "reader")
    with socket.create_server(("127.0.0.1", 0)) as dead:  # it takes connections and never speaks
        settings = {
            "store": store, "upstreams": {"m": {"base_url": engine.url, "model": "engine"}},
            "rag": {"uri": f"http://127.0.0.1:{dead.getsockname()[1]}", "timeout": 1.0},
        }  # fmt: skip
        with gateway(settings) as server, ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(lambda _: ask_documents(server, key, "hello"), range(8)))
            asked.append(ask_documents(server, key, "hello"))
    assert {told.json()["rag"]["status"] for told in asked} == {"no documents"}
    assert {told.json()["choices"][0]["message"]["content"] for told in asked} == {"one two three four five"}
    took = [told.json()["rag"]["search_ms"] for told in asked]
    assert max(took) < 5000 and took[-1] < 1000  # by then they were not asked at all


def test_documents_answer_for_a_model_that_is_down(engine: Server, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'gateway.db'}"
    key = add_key(store, "reader")
    passages = [("Cows", "Cows give milk."), ("Bees", "Bees make honey.")]
    uri = made_documents(str(tmp_path / "documents.db"), passages, keywords=True)
    settings = {
        "store": store, "upstreams": {"m": {"base_url": f"http://127.0.0.1:{free_port()}"}},
        "rag": {"uri": uri, "limit": 1, "mode": "keywords", "threshold": 0, "timeout": LONG},  # without a model to load
    }  # fmt: skip
    with gateway(settings) as server:
        told = ask_documents(server, key, "Which animal gives milk?")
    assert (told.status_code, told.json()["rag"]["status"]) == (200, "no model")
    assert [source["title"] for source in told.json()["sources"]] == ["Cows"]
    assert "Cows give milk." in told.json()["choices"][0]["message"]["content"]
    assert "x-served-model" not in told.headers


# The page


def test_a_person_chats_through_the_page(engine: Server, tmp_path: Path) -> None:
    import browser

    if browser.chromium() is None:
        pytest.skip("chromium is not installed")
    store, folder = f"sqlite:///{tmp_path / 'gateway.db'}", tmp_path / "record"
    key = add_key(store, "person")
    upstream = {"base_url": engine.url, "model": "engine"}
    settings = {
        "store": store, "upstreams": {"first": upstream, "second": upstream},
        "record": {"folder": str(folder), "flush_seconds": 0.1},
    }  # fmt: skip
    with gateway(settings) as server, browser.opened(f"{server.url}/chat") as page:
        page.until("document.getElementById('key') !== null")
        page.js(f"$('key').value = '{key}'; $('key').dispatchEvent(new Event('change'))")
        assert page.until("[...$('model').options].map(o => o.value).join()") == "first,second"
        page.js("$('model').value = 'second'; $('text').value = 'hello'; $('form').requestSubmit()")
        page.until("document.querySelectorAll('.meta button').length === 2")
        assert page.js("document.querySelector('.message:not(.user)').firstChild.textContent") == (
            "one two three four five"
        )
        assert "second" in page.js("document.querySelector('.meta').textContent")
        page.js("document.querySelector('.meta button').click()")
        page.until("document.querySelector('.meta button[aria-pressed=true]') !== null")
        until(lambda: read_rows(folder, "feedback"))
        [verdict] = read_rows(folder, "feedback")
        [asked] = read_rows(folder, "requests")
        assert (verdict["request_id"], verdict["score"]) == (asked["request_id"], 1.0)
        page.js("$('text').value = 'cut'; $('form').requestSubmit()")
        assert "cut off" in page.until("(document.querySelector('.error') || {}).textContent")
        page.js("$('text').value = 'long'; $('form').requestSubmit()")
        page.until("$('send').textContent === 'Stop' && document.body.innerText.includes('x x x')")
        page.js("$('form').requestSubmit()")
        page.until("$('send').textContent === 'Send'")
        until(lambda: engine.seen()["running"] == 0)
        page.js("$('key').value = 'wrong'; $('key').dispatchEvent(new Event('change'))")
        page.until("document.body.innerText.includes('Incorrect API key')")
        page.picture(tmp_path / "chat.png")
        assert (tmp_path / "chat.png").stat().st_size > 5000
