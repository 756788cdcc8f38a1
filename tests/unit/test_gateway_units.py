"""The gateway's parts, each alone: keys, counters, places, breaker, cost, events, routes, redaction."""

import asyncio
import itertools
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.gateway.access_log import open_log
from serve.gateway.admission import Admission
from serve.gateway.api_keys import ApiKey
from serve.gateway.app import Gateway
from serve.gateway.breaker import Breaker
from serve.gateway.checks import check_settings
from serve.gateway.cost import Meter
from serve.gateway.errors import ApiError
from serve.gateway.exchange import Exchange, new_ids, parse
from serve.gateway.metrics import SHARED_FOLDER, Metrics, forget_ended
from serve.gateway.own_key import own_key
from serve.gateway.routes import variant
from serve.gateway.settings import GatewayConfig, ModelPolicy, Personal, RecordConfig
from serve.gateway.sse import Events
from workbench.config import load
from workbench.errors import UserError

T = TypeVar("T")


def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gateway.db'}"


@pytest.mark.parametrize(("models", "allowed"), [([], True), (["a"], True), (["b"], False)])
def test_a_key_may_use_what_its_list_names_and_all_without_one(models: list[str], allowed: bool) -> None:
    assert ApiKey("i", "d", "o", models=models).allows("a") is allowed


# Places


def test_past_the_queue_a_request_is_refused_at_once() -> None:
    async def work() -> None:
        admission = Admission("m", ModelPolicy(concurrency=1, queue=1, queue_timeout=5), 1)
        release = asyncio.Event()

        async def hold() -> None:
            async with admission.place():
                await release.wait()

        tasks = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 1)
        with pytest.raises(ApiError) as refused:
            async with admission.place():
                pass
        assert (refused.value.status, refused.value.kind) == (503, "overloaded")
        release.set()
        await asyncio.gather(*tasks)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(work())


def test_a_wait_ends_with_its_time_and_a_cancelled_one_leaves_nothing() -> None:
    async def work() -> None:
        admission = Admission("m", ModelPolicy(concurrency=1, queue=5, queue_timeout=0.02), 1)
        async with admission.place():
            with pytest.raises(ApiError, match="no place"):
                async with admission.place():
                    pass
            waiting = asyncio.create_task(admission.place().__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert admission.waiting == 0
        async with admission.place() as waited:
            assert waited < 0.02

    asyncio.run(work())


# Breaker


def test_faults_in_a_row_open_the_breaker_and_one_success_closes_it() -> None:
    breaker = Breaker("m", ModelPolicy(breaker_failures=3, breaker_seconds=0.05))
    for _ in range(2):
        breaker.failed()
    breaker.answered()  # no longer in a row
    for _ in range(2):
        breaker.failed()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    with pytest.raises(ApiError) as refused:
        breaker.enter()
    assert refused.value.kind == "breaker_open"


def test_an_open_breaker_lets_one_request_try(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = Breaker("m", ModelPolicy(breaker_failures=1, breaker_seconds=1e-6))
    breaker.failed()
    assert breaker.enter()
    with pytest.raises(ApiError):
        breaker.enter()  # while the first one tries
    breaker.failed()
    breaker.leave(True)
    assert breaker.is_open
    assert breaker.enter()
    breaker.leave(True)  # its client left: nothing is known, so the next one may try
    assert breaker.enter()
    breaker.answered()
    breaker.leave(True)
    assert not breaker.is_open
    assert not breaker.enter()


# Cost


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 5), st.booleans()), min_size=1, max_size=40))
def test_the_shares_of_all_requests_sum_to_the_time_in_use(steps: list[tuple[float, bool]]) -> None:
    now = 0.0
    meter = Meter(lambda: now)
    running: list[float] = []
    shares = busy = 0.0
    for seconds, start in steps:
        if start or not running:
            running.append(meter.start())
        else:
            shares += meter.stop(running.pop())
        busy += seconds if running else 0.0
        now += seconds
    shares += sum(meter.stop(started) for started in running)
    assert shares == pytest.approx(busy)


def test_energy_costs_beside_the_cards() -> None:
    assert ModelPolicy(price_per_hour=3.6).price_per_second == pytest.approx(0.001)
    policy = ModelPolicy(price_per_hour=3.6, watts=1000, price_per_kwh=0.36)
    assert policy.price_per_second == pytest.approx(0.0011)


# Events of a stream

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"a\\n\\nb"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":" c"}}]}\n\n' + USAGE + b"data: [DONE]\n\n"
)


@settings(deadline=None)
@given(st.lists(st.integers(1, len(STREAM)), max_size=8), st.booleans())
def test_however_a_stream_is_cut_its_bytes_and_its_figures_are_the_same(cuts: list[int], hide: bool) -> None:
    events = Events(hide_usage=hide)
    events.text = []
    places = [0, *sorted(set(cuts)), len(STREAM)]
    out = b"".join(events.feed(STREAM[a:b])[0] for a, b in itertools.pairwise(places))
    assert out == (STREAM.replace(USAGE, b"") if hide else STREAM)
    assert (events.chunks, events.usage["completion_tokens"], events.done) == (2, 2, True)
    assert "".join(events.text) == "a\n\nb c"


def test_the_usage_that_comes_with_a_choice_stays() -> None:
    data = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"usage":{"completion_tokens":1}}\n\n'
    assert Events(hide_usage=True).feed(data) == (data, 1)


@pytest.mark.parametrize(
    "delta",
    ['{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}', '{"reasoning_content":"hm"}', '{"text": "t"}'],
)
def test_tool_calls_and_reasoning_are_first_tokens_too(delta: str) -> None:
    assert Events(False).feed(f'data: {{"choices":[{{"delta":{delta}}}]}}\n\n'.encode())[1] == 1


@pytest.mark.parametrize(
    ("choice", "token"),
    [
        ('{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}', False),
        ('{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":null}', True),
        ('{"index": 0, "text": "", "finish_reason": null}', True),
        ('{"index":0,"delta":{},"finish_reason":"stop"}', False),
        ('{"index":0,"delta":{"role":"assistant","content":"x"}}', True),
    ],
    ids=["opening", "half a character", "half a character of a completion", "end", "a role in every chunk"],
)
def test_a_token_without_text_is_a_first_token_and_an_opening_is_none(choice: str, token: bool) -> None:
    assert Events(False).feed(f'data: {{"choices":[{choice}]}}\n\n'.encode())[1] == token


# Requests


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b'"x"', b'{"a": NaN}', b'{"a": "\xff"}', b'{"a":' + b"[" * 100_000, b'{"a": 1e999}']
)
def test_a_body_that_is_no_json_object_is_the_clients_error(raw: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse(raw)
    assert refused.value.status == 400


@pytest.mark.parametrize("depth", [253, 300, 1000])
def test_a_body_that_cannot_be_written_again_is_the_clients_error(depth: int) -> None:
    with pytest.raises(ApiError) as refused:
        parse(b'{"x":' + b"[" * depth + b"]" * depth + b"}")
    assert (refused.value.status, "nested" in refused.value.message) == (400, True)


def test_a_deep_body_and_many_brackets_are_let_in() -> None:
    deep = parse(b'{"x":' + b"[" * 240 + b"]" * 240 + b"}")
    assert exchange(deep).body_for("m", own=True)
    assert parse(b'{"x":"' + b"[" * 5000 + b'"}') == {"x": "[" * 5000}


def test_a_trace_goes_on_and_a_malformed_one_begins_anew() -> None:
    given_trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    request_id, trace, parent = new_ids("mine", given_trace)
    assert request_id.startswith("mine-")
    assert (trace, parent[:36]) == ("0af7651916cd43dd8448eb211c80319c", given_trace[:36])
    assert parent != given_trace  # the engine's parent is the gateway's span
    for wrong in ("", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "x\r\ny"):
        assert new_ids("a b\n", wrong)[1] != "0" * 32
        assert new_ids("a b\n", wrong)[0].isprintable()


def exchange(body: dict[str, Any]) -> Exchange:
    made = Exchange("r1", "t", "p", path="/v1/chat/completions", key=ApiKey("i", "d", "alice"))
    made.body = body
    return made


def test_what_a_client_sends_reaches_the_engine_unchanged_but_for_three_fields() -> None:
    import json

    body = {"model": "route", "messages": [], "stream": True, "guided_regex": "x+", "seed": 2**60, "extra": {"a": [1]}}
    sent = json.loads(exchange(body).body_for("m", own=True))
    assert sent == {**body, "model": "m", "request_id": "r1", "stream_options": {"include_usage": True}}
    odd = {"model": "m", "stream": True, "stream_options": "what"}
    assert json.loads(exchange(odd).body_for("m", own=False)) == odd  # the engine's to refuse


# Routes


def test_a_users_variant_never_changes_and_the_weights_hold() -> None:
    weights = {"base": 3.0, "tuned": 1.0}
    chosen = [variant("assistant", weights, f"user {i}") for i in range(4000)]
    assert chosen == [variant("assistant", weights, f"user {i}") for i in range(4000)]
    assert 0.22 < chosen.count("tuned") / 4000 < 0.28
    other = [variant("second", weights, f"user {i}") for i in range(4000)]
    both = sum(a == b == "tuned" for a, b in zip(chosen, other, strict=True))
    assert 0.04 < both / 4000 < 0.085  # independent: 1/16


@settings(deadline=None)
@given(st.text(), st.floats(0, 1))
def test_a_variant_without_weight_is_never_chosen(user: str, weight: float) -> None:
    assert variant("r", {"never": 0.0, "b": weight + 0.1, "also never": 0.0}, user) == "b"


@pytest.mark.parametrize("routes", ["{a: {}}", "{a: {m: 0}}", "{a: {m: -1, n: 2}}", "{a: {b: 1}, b: {m: 1}}"])
def test_routes_without_sense_are_refused(routes: str) -> None:
    with pytest.raises(UserError, match="routes"):
        load(GatewayConfig, None, [f"routes={routes}"])


# Settings


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"models": {"tunde": {}}}, "gateway.models.tunde: no model is called 'tunde'; there are base, far, tuned"),
        ({"models": {"tuned": {"fallback": ["bse"]}}}, "gateway.models.tuned.fallback: no model is called 'bse'"),
        ({"defaults": {"fallback": ["bse"]}}, "gateway.defaults.fallback: no model is called 'bse'"),
        ({"routes": {"a": {"base": 1, "bse": 1}}}, "gateway.routes.a: no model is called 'bse'"),
        ({"upstreams": {"far": {"base_url": "http://h", "api_key_file": "/nowhere/key"}}}, "far.api_key_file: cannot"),
        ({"rag": {"template": "/nowhere/prompt.j2"}}, "template: /nowhere/prompt.j2"),
    ],
)
def test_settings_that_name_what_is_not_there_are_refused(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    settings = {"store": uri(tmp_path), "upstreams": {"far": {"base_url": "http://h/v1"}}, **more}
    with pytest.raises(UserError, match=re.escape(told)):
        check_settings(GatewayConfig(**settings), ["base", "tuned"])


def test_settings_may_name_models_and_upstreams(tmp_path: Path) -> None:
    check_settings(
        GatewayConfig(store=uri(tmp_path), upstreams={"far": {"base_url": "http://h/v1"}},
                      models={"tuned": {"fallback": ["far"]}}, routes={"a": {"base": 1, "far": 1}}),
        ["base", "tuned"],
    )  # fmt: skip


def test_a_store_that_does_not_answer_and_a_log_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing answers at redis://127\.0\.0\.1:1/0"):
        asyncio.run(own_key(GatewayConfig(store="redis://127.0.0.1:1/0"), "wb-x"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"gateway\.log_file"):
        open_log(tmp_path / "file" / "log")


def test_what_is_redacted_is_what_can_be_found() -> None:
    from data_pipelines.pii import KINDS

    assert get_args(Personal) == KINDS == tuple(RecordConfig().redact)
    with pytest.raises(ValueError, match="redact"):
        RecordConfig.model_validate({"redact": ["emails"]})


# Records


def test_a_record_keeps_no_personal_data(tmp_path: Path) -> None:
    from serve.gateway.record import Recorder, read_rows

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=tmp_path / "log", text=True))
        kept = exchange(
            {"model": "m", "messages": [{"role": "user", "content": "I am eve@example.org, card 4111 1111 1111 1111"}]}
        )
        kept.served, kept.answer = "m", "Hello eve@example.org"
        recorder.request(kept)
        recorder.feedback("r1", 1.0, "write to eve@example.org", "alice")
        await recorder.flush()

    asyncio.run(work())
    [row] = read_rows(tmp_path / "log", "requests")
    assert row["answer"] == "Hello [email]"
    assert "[email]" in row["body"] and "[card]" in row["body"] and '"role":"user"' in row["body"]
    [verdict] = read_rows(tmp_path / "log", "feedback")
    assert (verdict["request_id"], verdict["comment"]) == ("r1", "write to [email]")
    assert not any(b"eve@" in file.read_bytes() for file in (tmp_path / "log").iterdir())
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in (tmp_path / "log").iterdir())


def test_a_row_that_comes_while_a_file_is_written_gets_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.gateway.record import Recorder, read_rows

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=tmp_path / "log", flush_seconds=0.01))
        write, loop = recorder._write, asyncio.get_running_loop()
        written = 0

        def slow(kind: str, rows: list[dict[str, Any]]) -> None:
            nonlocal written
            if not written:  # from the thread that writes the first file
                asyncio.run_coroutine_threadsafe(another(), loop).result()
            written += 1
            write(kind, rows)

        async def another() -> None:
            recorder.feedback("second", 1.0, "", "o")

        monkeypatch.setattr(recorder, "_write", slow)
        recorder.feedback("first", 1.0, "", "o")
        while written < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 60))
    assert {row["request_id"] for row in read_rows(tmp_path / "log", "feedback")} == {"first", "second"}


def test_users_stay_apart_in_a_record_without_their_addresses(tmp_path: Path) -> None:
    from serve.gateway.record import Recorder, read_rows

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=tmp_path / "log"))
        for told in ({"user": "eve@example.org"}, {"safety_identifier": "bob@example.org"}, {"user": "u1"}):
            kept = exchange({"model": "m", "prompt": "x", **told})
            kept.served, kept.reason = "m", "no such user eve@example.org"
            recorder.request(kept)
        await recorder.flush()

    asyncio.run(work())
    rows = read_rows(tmp_path / "log", "requests")
    users = [row["user"] for row in rows]
    assert len(set(users)) == 3 and users[2] == "u1" and all(user.startswith("[email]-") for user in users[:2])
    assert {row["reason"] for row in rows} == {"no such user [email]"}


def test_rows_wait_while_their_folder_cannot_be_written(tmp_path: Path) -> None:
    from serve.gateway.record import Recorder, read_rows

    (tmp_path / "log").write_text("in the way")

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=tmp_path / "log", text=True, flush_seconds=0.01))
        kept = exchange({"model": "m", "prompt": "write to eve@example.org"})
        kept.served = "m"
        recorder.request(kept)
        recorder.feedback("r1", 1.0, "", "alice")
        await asyncio.sleep(0.1)
        (tmp_path / "log").unlink()
        while len(list((tmp_path / "log").glob("[rf]*.parquet"))) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 60))
    [row] = read_rows(tmp_path / "log", "requests")
    assert row["body"] == '{"model":"m","prompt":"write to [email]"}'
    assert len(read_rows(tmp_path / "log", "feedback")) == 1


def test_without_texts_a_record_has_none(tmp_path: Path) -> None:
    from serve.gateway.record import Recorder, read_rows

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=tmp_path / "log"))
        kept = exchange({"model": "m", "prompt": "a secret", "user": "u"})
        kept.served, kept.answer = "m", "another"
        recorder.request(kept)
        await recorder.flush()

    asyncio.run(work())
    [row] = read_rows(tmp_path / "log", "requests")
    assert (row["body"], row["answer"], row["user"]) == (None, None, "u")


def test_a_record_that_lacks_a_column_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from serve.gateway.record import SCHEMAS, read_rows

    pq.write_table(pa.table({"request_id": ["old"]}), tmp_path / "requests-1.parquet")
    new = {"request_id": "new", "side_tokens": 3}
    pq.write_table(pa.Table.from_pylist([new], SCHEMAS["requests"]()), tmp_path / "requests-2.parquet")
    rows = read_rows(tmp_path, "requests")
    assert [(row["request_id"], row["side_tokens"]) for row in rows] == [("old", None), ("new", 3)]


# The middleware


def answers(
    tmp_path: Path, path: str, headers: list[tuple[bytes, bytes]], kind: str = "http", method: str = "GET"
) -> Any:
    """What a gateway over an application that must not be reached sends."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the application was reached")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": kind, "path": path, "root_path": "", "headers": headers, "method": method}
    asyncio.run(Gateway(application, GatewayConfig(store=uri(tmp_path)))(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"secret")],
        [(b"authorization", b"Basic secret")],
        [(b"authorization", b"Bearer secret"), (b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", b"secret")],
    ],
)
def test_without_a_key_of_the_store_the_answer_is_401(tmp_path: Path, headers: list[tuple[bytes, bytes]]) -> None:
    start = answers(tmp_path, "/v1/models", headers)[0]
    assert (start["type"], start["status"]) == ("http.response.start", 401)


@pytest.mark.parametrize(
    "path", ["/docs", "/openapi.json", "/metrics", "/v1/chat/completions", "/health/../v1/models", "/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "PATCH"])
def test_no_path_goes_round_the_gateway(tmp_path: Path, path: str, method: str) -> None:
    assert answers(tmp_path, path, [], method=method)[0]["status"] == 401


def test_a_websocket_is_closed(tmp_path: Path) -> None:
    assert answers(tmp_path, "/v1/models", [], kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_health_is_open_and_tells_nothing(tmp_path: Path) -> None:
    start, body = answers(tmp_path, "/health", [])
    assert (start["status"], body["body"]) == (200, b'{"status":"ok"}')


@pytest.mark.parametrize(("path", "method"), [("/v1/chat/completions", "POST"), ("/v1/models", "GET")])
def test_a_wrong_key_is_counted_wherever_it_knocks(tmp_path: Path, path: str, method: str) -> None:
    gateway = Gateway(None, GatewayConfig(store=uri(tmp_path)))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "root_path": "", "headers": [], "method": method}
    asyncio.run(gateway(scope, send, send))
    assert sent[0]["status"] == 401
    counted = 'workbench_requests_total{model="none",outcome="invalid_api_key",owner="none"} 1.0'
    assert counted in gateway.state.metrics.render().decode()


def test_the_gauges_of_a_process_that_has_ended_are_dropped_and_its_counters_kept(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"{kind}_{pid}.db" for kind in ("gauge_livesum", "gauge_livemax", "counter", "histogram")
             for pid in (ended.pid, os.getpid())]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    forget_ended(tmp_path)
    gone = {f"gauge_livesum_{ended.pid}.db", f"gauge_livemax_{ended.pid}.db"}
    assert {file.name for file in tmp_path.iterdir()} == set(names) - gone


def test_a_replica_on_another_host_makes_its_folder_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path / "gone" / "metrics"))
    Metrics()
    assert (tmp_path / "gone" / "metrics").is_dir()
