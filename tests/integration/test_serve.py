"""One tiny model served by vLLM on the CPU under Ray Serve, used through the unchanged OpenAI client."""

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from made_documents import made_documents
from models import make_tiny_llama, make_tool_caller, random_adapter

from profiling.trace_events import read_traces
from profiling.trace_summary import by_kind
from serve import ask, availability, down, loadtest, logs, status, trace, up
from serve.endpoint import context_length, count_tokens
from serve.engine import traces_folder
from serve.keys import default_key_file, read_key
from workbench.config import load
from workbench.errors import Failure, UserError
from workbench.runs import Run, open_run

pytestmark = pytest.mark.skipif(availability.available() is not None, reason=str(availability.available()))

CONTEXT = 256
CALLS = {
    f"weather in {city}": f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for city in ("Oslo", "Paris")
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PASSAGES = [
    ("Cows", "A cow is a large animal. It gives milk every day! Farmers keep cows, e.g. for cheese." + " Grass." * 150),
    ("Bees", "Bees make honey. They live in hives, and one queen leads them. Do they sleep at night?" + " Wax." * 150),
    ("Rocks", "Granite is hard. It cools slowly under the ground, which makes its crystals large."),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def opened(name: str, config: object) -> Run:
    with open_run("serve", name, config) as run:  # type: ignore[arg-type]
        return run


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, collection: str) -> Iterator[up.ServeConfig]:
    """One model named ``tiny`` that calls tools, with an adapter named ``poet``; the key is in the default key file of
    the module's runs root."""
    root = tmp_path_factory.mktemp("serve")
    model = make_tool_caller(root / "model", context=CONTEXT, calls=CALLS)
    poet = random_adapter(model, root / "poet")
    engine = (
        "{enable_auto_tool_choice: true, tool_call_parser: hermes, "
        "structured_outputs_config: {backend: xgrammar, disable_any_whitespace: true}}"
    )
    entry = (
        f"{{name: tiny, source: '{model}', device: cpu, adapters: {{poet: '{poet}'}}, engine: {engine}, warm_up: The}}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RUNS_ROOT", str(root / "runs"))
        patch.delenv("OPENAI_API_KEY", raising=False)
        gateway = (
            f"gateway={{rag: {{uri: '{collection}', limit: 2, threshold: -1}}, defaults: {{price_per_hour: 3600}}}}"
        )
        yield load(up.ServeConfig, None, [f"models=[{entry}]", f"port={free_port()}", "timeout=540", gateway])


@pytest.fixture(scope="module")
def endpoint(ray_session: None, served: up.ServeConfig) -> Iterator[str]:
    """The base URL of the served model."""
    summary = up.run(served, opened("up", served))
    try:
        yield summary["url"]
    finally:
        down.run(down.DownConfig(), opened("down", down.DownConfig()))


@pytest.fixture
def client(endpoint: str) -> Iterator[openai.OpenAI]:
    """The OpenAI client with the right key."""
    with openai.OpenAI(base_url=endpoint, api_key=read_key(default_key_file()), max_retries=0) as made:
        yield made


def test_models_are_listed_with_their_context(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "poet"]
    assert context_length(client, "tiny") == CONTEXT


def test_a_completion_has_text_and_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="def test", max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.choices[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_a_chat_is_answered_through_the_models_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > count_tokens(client, "tiny", "hello")


def test_a_stream_arrives_in_chunks_and_equals_the_whole(client: openai.OpenAI) -> None:
    def ask_once(stream: bool) -> object:
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=24, temperature=0, stream=stream,
            extra_body={"ignore_eos": True},
        )  # fmt: skip

    whole = ask_once(False).choices[0].message.content  # type: ignore[attr-defined]
    pieces = [chunk.choices[0].delta.content for chunk in ask_once(True) if chunk.choices]  # type: ignore[attr-defined]
    assert len(pieces) > 3
    assert "".join(piece or "" for piece in pieces) == whole


def test_an_adapter_is_chosen_by_its_name(client: openai.OpenAI) -> None:
    def written(model: str) -> str:
        answer = client.completions.create(
            model=model, prompt="def test", max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.model == model
        return answer.choices[0].text

    assert written("poet") == written("poet") != written("tiny")


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "s": {"enum": ["a"]}}, "required": ["n", "s"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=40, temperature=1.0, seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    told = json.loads(answer.choices[0].message.content or "")
    assert told["s"] == "a" and told["n"] in (1, 2)


def test_a_model_that_learned_to_calls_a_tool(client: openai.OpenAI) -> None:
    for city in ("Oslo", "Paris"):
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"weather in {city}"}], tools=[WEATHER],  # type: ignore[list-item]
            max_tokens=48, temperature=0,
        )  # fmt: skip
        [call] = answer.choices[0].message.tool_calls or []
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": city}
        assert answer.choices[0].finish_reason == "tool_calls"


def test_a_strict_tool_is_called_by_its_schema_whatever_the_model_would_say(client: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], tools=[strict],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=48, temperature=0,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")


@pytest.mark.parametrize("key", ["wrong", "wb-"])
def test_a_wrong_key_is_an_authentication_error(endpoint: str, key: str) -> None:
    with openai.OpenAI(base_url=endpoint, api_key=key, max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/docs", "/openapi.json", "/nothing"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_without_a_key_nothing_is_reached(endpoint: str, method: str, path: str) -> None:
    answer = httpx.request(method, endpoint.removesuffix("/v1") + path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_is_open(endpoint: str) -> None:
    assert httpx.get(endpoint.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="absent"):
        client.completions.create(model="absent", prompt="x")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt"',
        b"[1, 2]",
        b"",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": "hot"}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": -1}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 100000}',
        b'{"model": "tiny", "prompt": {"a": NaN}}',
        b'{"model": "tiny"}',
    ],
)
def test_a_malformed_request_is_the_clients_error(client: openai.OpenAI, body: bytes) -> None:
    answer = httpx.post(
        f"{client.base_url}completions",
        content=body,
        headers={"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"},
    )
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_the_key_is_in_no_log_and_no_run_folder(client: openai.OpenAI) -> None:
    import ray

    client.models.list()
    key = client.api_key.encode()
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    runs = default_key_file().parents[1]
    written = [p for root in (logs, runs) for p in root.rglob("*") if p.is_file() and p != default_key_file()]
    assert len(written) > 10
    assert [path for path in written if key in path.read_bytes()] == []


def test_a_second_up_is_refused_while_one_is_up(endpoint: str) -> None:
    config = load(up.ServeConfig, None, ["models=[{name: other, source: owner/other, device: cpu}]"])
    with pytest.raises(UserError, match="already up with tiny"):
        up.run(config, opened("up", config))


def test_an_engine_argument_that_vllm_does_not_know_names_the_nearest(endpoint: str) -> None:
    config = load(up.ServeConfig, None, ["models=[{name: a, source: o/a, engine: {max_modle_len: 8}, device: cpu}]"])
    with pytest.raises(UserError, match="did you mean 'max_model_len'"):
        up.run(config, opened("up", config))


@pytest.mark.parametrize(
    ("method", "reason"), [("bitsandbytes", "merge it into 16 bits"), ("gptqq", "did you mean 'gptq'")]
)
def test_weights_that_vllm_does_not_read_are_refused(endpoint: str, tmp_path: Path, method: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    config = load(up.ServeConfig, None, [f"models=[{{name: a, source: '{tmp_path}', device: cpu}}]"])
    with pytest.raises(UserError, match=reason):
        up.check(config)


def test_pipeline_stages_are_planned_as_vllm_divides_them(endpoint: str) -> None:
    from vllm.distributed.utils import get_pp_indices

    from serve.fits import vllm_layers

    for layers in (7, 32, 61, 64):
        for stages in (1, 2, 3, 4, 7):
            ends = [get_pp_indices(layers, rank, stages) for rank in range(stages)]
            assert vllm_layers(layers, stages) == tuple(end - start for start, end in ends)


def test_more_cards_than_the_cluster_has_are_refused_at_once(endpoint: str) -> None:
    config = load(
        up.ServeConfig,
        None,
        ["models=[{name: a, source: o/a, device: gpu, cpus: 0.0001, engine: {tensor_parallel_size: 2048}}]"],
    )
    with pytest.raises(UserError, match="there is no card in this cluster"):
        up.run(config, opened("up", config))


def test_status_says_that_the_model_answers(endpoint: str) -> None:
    summary = status.run(status.StatusConfig(), opened("status", status.StatusConfig()))
    assert (summary["status"], summary["models"], summary["answering"]) == ("running", 1, 1)


# The gateway over a real engine


def gateway_says(client: openai.OpenAI, path: str) -> httpx.Response:
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    return httpx.get(f"{root}{path}", headers={"Authorization": f"Bearer {client.api_key}"}, timeout=30)


def test_the_gateway_knows_its_engines_and_counts_their_tokens(client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="def test", max_tokens=5, extra_body={"ignore_eos": True})
    ready = gateway_says(client, "/ready").json()
    assert ready["status"] == "ready"
    assert all(ready["models"][name]["ready"] for name in ("tiny", "poet"))
    metrics = gateway_says(client, "/metrics").text
    for name, label in (("tokens", 'kind="completion",'), ("cost", "")):
        line = next(n for n in metrics.splitlines() if n.startswith(f'workbench_{name}_total{{{label}model="tiny"'))
        assert float(line.rsplit(" ", 1)[1]) > 0


def test_a_key_from_the_command_is_good_at_once_and_only_for_its_models(client: openai.OpenAI) -> None:
    from typer.testing import CliRunner

    from serve.gateway.keys_cli import keys_app

    made = json.loads(CliRunner().invoke(keys_app, ["add", "guest", "--model", "poet", "--json"]).stdout)
    with openai.OpenAI(base_url=client.base_url, api_key=made["key"], max_retries=0) as guest:
        assert [model.id for model in guest.models.list()] == ["poet"]
        assert guest.completions.create(model="poet", prompt="x", max_tokens=1).usage
        with pytest.raises(openai.PermissionDeniedError):
            guest.completions.create(model="tiny", prompt="x", max_tokens=1)


def test_a_client_that_leaves_frees_its_place_at_the_engine(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while gateway_says(client, "/ready").json()["models"]["tiny"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 'outcome="client_gone"' in gateway_says(client, "/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_over_documents_comes_with_its_sources(client: openai.OpenAI, stream: bool) -> None:
    question = {"role": "user", "content": "Which animal gives milk?"}
    body = {"model": "tiny", "messages": [question], "max_tokens": 16, "stream": stream}
    answer = client.post("/rag/chat/completions", body=body, cast_to=httpx.Response)
    text = answer.text
    if stream:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        text = events[-2]
    told = json.loads(text)
    assert told["rag"]["status"] == "ok"
    assert [source["number"] for source in told["sources"]] == [1, 2]
    assert told["sources"][0]["title"] == "Cows" and told["sources"][0]["id"] == "0#0"


def test_a_loadtest_measures_each_level(endpoint: str) -> None:
    config = load(
        loadtest.LoadTestConfig,
        None,
        [f"base_url={endpoint}", "models=[tiny]", "concurrency=[1, 4]", "seconds=1", "max_tokens=6"],
    )
    run = opened("loadtest", config)
    summary = loadtest.run(config, run)
    assert summary["errors"] == 0
    assert summary["requests"] >= 5
    levels = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(levels) == 2
    assert [section["title"] for section in run.report.sections] == [
        "Load",
        "Checks",
        "Latency against throughput",
        "Time to first token",
        "Time between tokens",
        "Latency",
    ]
    assert "server's clock" in str(run.report.sections[1])
    assert "not told" not in str(run.report.sections[1])


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Milvus Lite folder with three passages, embedded by the real model."""
    return made_documents(str(tmp_path_factory.mktemp("milvus") / "documents.db"), PASSAGES)


def asked(endpoint: str, collection: str, *overrides: str) -> dict[str, object]:
    """The summary of ``serve ask``."""
    question = 'question="Which animal gives milk?"'
    config = load(
        ask.AskConfig,
        None,
        [question, f"uri={collection}", f"base_url={endpoint}", "limit=2", "model=tiny", *overrides],
    )
    return ask.run(config, opened("ask", config))


def test_a_quoted_answer_is_a_sentence_of_the_source_it_names(endpoint: str, collection: str) -> None:
    summary = asked(endpoint, collection, "mode=quote")
    [cited] = [int(number) for number in str(summary["cited"]).strip("[]").split(",")]
    title = str(summary[f"[{cited}]"]).split(" (book")[0]
    assert summary["answer"] in dict(PASSAGES)[title]
    assert str(summary["answer"]).endswith((".", "?", "!"))


def test_the_nearest_passage_is_the_first_source(endpoint: str, collection: str) -> None:
    assert str(asked(endpoint, collection, "mode=quote")["[1]"]).startswith("Cows")


def test_a_free_answer_fits_the_context_whatever_the_passages(endpoint: str, collection: str) -> None:
    summary = asked(endpoint, collection, "mode=free", "max_tokens=16")
    assert 100 < int(str(summary["prompt_tokens"])) <= CONTEXT - 16


def test_a_question_that_leaves_no_room_for_passages_is_refused(endpoint: str, collection: str) -> None:
    with pytest.raises(UserError, match=f"{CONTEXT} tokens of context"):
        asked(endpoint, collection, "mode=free", f"max_tokens={CONTEXT}")


def test_every_answer_of_a_loadtest_has_the_asked_length(client: openai.OpenAI) -> None:
    from serve.traffic import Level, Prompt, Target, drive

    target = Target(str(client.base_url).rstrip("/"), client.api_key, "tiny", True, 30.0)
    driven = drive(target, [Prompt.of("hello", 6), Prompt.of("world", 6)], Level("closed", 2, 0.5))
    assert {outcome.output_tokens for outcome in driven.outcomes} == {6}
    assert all(0 < outcome.first_token <= outcome.latency <= driven.wall for outcome in driven.outcomes)


@pytest.mark.parametrize("arrival", ["constant", "poisson", "ramp", "replay"])
def test_an_open_loop_sends_what_was_planned(client: openai.OpenAI, arrival: str) -> None:
    from serve.traffic import Level, Prompt, Target, drive

    target = Target(str(client.base_url).rstrip("/"), client.api_key, "tiny", True, 30.0)
    message = ({"role": "user", "content": "hello"},)
    prompts = [Prompt(message, 3, at) for at in (0.0, 0.2, 0.8, 1.0)]
    level = Level(arrival, 4.0, 1.0, start=4.0)  # type: ignore[arg-type]
    driven = drive(target, prompts, level)
    assert [outcome.error for outcome in driven.outcomes] == [""] * 4
    sent = sorted(outcome.started for outcome in driven.outcomes)
    if arrival == "replay":  # a loaded machine may be late, never early
        assert all(at - sent[0] >= planned - 0.05 for at, planned in zip(sent, (0.0, 0.2, 0.8, 1.0), strict=True))


def test_a_loadtest_of_refused_requests_names_their_kind(endpoint: str) -> None:
    from serve.traffic import Level, Prompt, Target, drive

    driven = drive(Target(endpoint, "wrong", "tiny", True, 30.0), [Prompt.of("hello", 6)], Level("closed", 1, 0.05))
    assert {outcome.error for outcome in driven.outcomes} == {"HTTP 401"}


def serving_processes() -> list[str]:
    """Command lines of our descendants that belong to an engine or to Serve."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    return [line for line in lines if line.startswith(("VLLM::", "ray::Serve", "ray::Proxy"))]


def listens(endpoint: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", httpx.URL(endpoint).port or 0)) == 0


def assert_nothing_is_left(endpoint: str) -> None:
    assert status.run(status.StatusConfig(), opened("status", status.StatusConfig())) == {"status": "down"}
    deadline = time.monotonic() + 30  # Ray reaps its workers after it has answered
    while (serving_processes() or listens(endpoint)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert serving_processes() == []
    assert not listens(endpoint)


def test_a_window_of_the_engine_is_traced_while_it_serves(client: openai.OpenAI) -> None:
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            client.completions.create(model="tiny", prompt="a b c", max_tokens=32)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        made = opened("trace", load(trace.TraceConfig, None, ["model=tiny", "seconds=1"]))
        summary = trace.run(load(trace.TraceConfig, None, ["model=tiny", "seconds=1"]), made)
    finally:
        ended.set()
        asking.join()
    assert summary["ranks"] == 1
    [worker] = read_traces(made.folder)
    assert {"matrix", "attention"} <= {row["kind"] for row in by_kind(worker)}
    [file] = (made.folder / "artifacts" / "trace").iterdir()
    assert b"traceEvents" in gzip.decompress(file.read_bytes())
    assert not list(traces_folder("tiny").rglob("*.pt.trace.json*"))
    with pytest.raises(UserError, match="model 'tinny' is not served; tiny is"):
        trace.run(load(trace.TraceConfig, None, ["model=tinny"]), made)


def test_logs_show_what_the_engine_wrote(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = logs.run(logs.LogsConfig(model="tiny"), opened("logs", logs.LogsConfig()))
    assert told["models"] == "tiny"
    assert capsys.readouterr().out.startswith("== tiny ==\n") and told["lines"] > 0
    with pytest.raises(UserError, match="did you mean tiny"):
        logs.run(logs.LogsConfig(model="tny"), opened("logs", logs.LogsConfig()))


def test_a_model_that_stays_the_same_is_not_restarted(endpoint: str, served: up.ServeConfig) -> None:
    """The gateway changes, the engine stays."""
    from serve.application import deployed

    before = deployed()
    assert before is not None
    changed = served.model_copy(update={"replace": True})
    up.run(changed, opened("up", changed))
    after = deployed()
    assert after is not None and after.workers_of("tiny") == before.workers_of("tiny")


def test_down_leaves_nothing(endpoint: str) -> None:
    """From here on there is no endpoint."""
    assert len(serving_processes()) >= 4  # controller, proxy, ingress, engine
    assert down.run(down.DownConfig(), opened("down", down.DownConfig())) == {"removed": True}
    assert_nothing_is_left(endpoint)


@pytest.mark.soak
def test_a_model_that_cannot_load_fails_with_the_engines_own_words(endpoint: str, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "broken")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    config = load(
        up.ServeConfig,
        None,
        [f"models=[{{name: broken, source: '{model}', device: cpu}}]", f"port={httpx.URL(endpoint).port}"],
    )
    with pytest.raises(Failure, match="SafetensorError"):
        up.run(config, opened("up", config))
    assert_nothing_is_left(endpoint)
