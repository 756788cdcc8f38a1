"""What is learned from the gateway's records, and the parts of answers over documents, each alone."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import serve.retrieval
from data_pipelines.search import Hit
from serve import ab_report, observe, rag_eval
from serve.ab_report import AbReportConfig
from serve.citations import cited, load_template, only_real, prompt
from serve.gateway.api_keys import ApiKey, key_of
from serve.gateway.app import Gateway
from serve.gateway.exchange import Exchange
from serve.gateway.rag import WithSources, last_question
from serve.gateway.record import Recorder, read_rows
from serve.gateway.relay import without_texts
from serve.gateway.settings import GatewayConfig, RecordConfig
from serve.intervals import difference, estimate
from serve.observe import ObserveConfig
from serve.retrieval import Documents, fuse, parse_wordings, wordings
from serve.similarity import bleu, rouge_l
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import open_run


def hit(name: str, score: float = 0.5, text: str = "text") -> Hit:
    return Hit(f"{name}#0", name.title(), text, "book", score, name)


# Intervals


def test_an_interval_of_like_requests_of_few_users_is_wider_than_that_of_as_many_users() -> None:
    random = np.random.default_rng(0)
    level = random.normal(size=20)
    values = [float(level[user] + 0.1 * random.normal()) for user in range(20) for _ in range(50)]
    by_user = estimate(values, [user for user in range(20) for _ in range(50)])
    as_if_alone = estimate(values, list(range(1000)))
    assert by_user.mean == pytest.approx(as_if_alone.mean)
    assert by_user.high - by_user.low > 3 * (as_if_alone.high - as_if_alone.low)


def test_a_95_percent_interval_holds_the_truth_about_that_often() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        first, second = random.normal(0, 1, 60), random.normal(0.3, 1, 60)
        gap = difference(list(first), list(range(60)), list(second), list(range(60)))
        held += gap.low <= 0.3 <= gap.high
    assert 180 <= held <= 199


def test_one_user_gives_no_interval() -> None:
    assert np.isnan(estimate([1.0, 2.0], ["a", "a"]).low)


# A/B


def recorded(folder: Path, better: str) -> None:
    """Sixty users of the route ``ab``; those of ``better`` like their answers, and wait as long."""
    random = np.random.default_rng(2)

    async def work() -> None:
        recorder = Recorder(RecordConfig(folder=folder))
        for user in range(60):
            model = "a" if user % 2 else "b"
            for number in range(5):
                made = Exchange(f"{user}-{number}", "t", "p", path="/v1/chat/completions", key=ApiKey("k", "d", "o"))
                made.asked = made.served = model
                made.variant_of, made.body, made.status = "ab", {"user": f"u{user}"}, 200
                made.total_s = float(random.gamma(4, 0.1))
                recorder.request(made)
                happy = random.random() < (0.9 if model == better else 0.4)
                recorder.feedback(made.request_id, 1.0 if happy else -1.0, "", "o")
        await recorder.flush()

    asyncio.run(work())


def test_the_report_finds_the_better_model_and_no_difference_where_there_is_none(
    tmp_path: Path, runs_root: Path
) -> None:
    recorded(tmp_path / "record", better="b")
    config = load(AbReportConfig, None, [f"folder={tmp_path / 'record'}", "baseline=a"])
    with open_run("serve", "ab-report", config) as run:
        summary = ab_report.run(config, run)
    assert (summary["route"], summary["requests"], summary["verdicts"]) == ("ab", 300, 300)
    assert summary["b_score_finding"] == "higher"
    assert summary["b_total_ms_finding"] == "none"
    assert [section["title"] for section in run.report.sections][:2] == ["Models", "Differences"]


def test_what_a_variants_breaker_refused_has_failed_and_what_a_keys_limits_refused_is_not_kept(tmp_path: Path) -> None:
    broken = "http://127.0.0.1:1/v1"
    made = GatewayConfig(
        store=f"sqlite:///{tmp_path / 'gateway.db'}", upstreams={"m": {"base_url": broken}}, routes={"ab": {"m": 1.0}},
        defaults={"retries": 0, "breaker_failures": 1}, record={"folder": tmp_path / "record"},
    )  # fmt: skip
    body = {"model": "ab", "messages": [{"role": "user", "content": "hello"}]}

    async def work() -> list[str]:
        gateway = Gateway(None, made)
        await gateway.state.store.add(key_of("wb-key", "o", requests_per_minute=2))
        headers = {"Authorization": "Bearer wb-key"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://x", headers=headers) as c:
            answers = [await c.post("/v1/chat/completions", json=body) for _ in range(3)]
        await gateway.close()
        return [answer.json()["error"]["code"] for answer in answers]

    codes = asyncio.run(work())
    assert codes == ["engine_unavailable", "breaker_open", "rate_limit_exceeded"]
    rows = read_rows(tmp_path / "record", "requests")
    assert [row["error"] for row in rows] == codes[:2]
    assert [failed for failed, _ in ab_report.by_model(rows, {})["m"]["failed"]] == [1.0, 1.0]


def test_a_report_without_a_route_says_which_there_are(tmp_path: Path, runs_root: Path) -> None:
    recorded(tmp_path / "record", better="b")
    config = load(AbReportConfig, None, [f"folder={tmp_path / 'record'}", "route=other"])
    with open_run("serve", "ab-report", config) as run, pytest.raises(UserError, match="ab"):
        ab_report.run(config, run)


# Likeness


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [("a b c d", "a b c d", 1.0), ("a b c d", "a x c y", 0.5), ("a b", "b a", 0.5), ("", "", 1.0), ("a", "", 0.0),
     ("The cat sat.", "the CAT sat", 1.0)],
)  # fmt: skip
def test_rouge_l_is_that_of_the_paper(reference: str, answer: str, score: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(score)


def test_bleu_of_the_same_is_100() -> None:
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    assert bleu(["the cat sat on the mat"], ["dogs ran off"]) < 5


# Answers over documents


def test_a_hit_that_several_wordings_find_comes_first() -> None:
    fused = fuse([[hit("a"), hit("b", 0.4)], [hit("c"), hit("b", 0.9)]], 2)
    assert [each.document for each in fused] == ["b", "a"]
    assert fused[0].score == 0.9


class Searching:
    """A searcher whose nearest passage scores 0.2."""

    encoder = None

    def __init__(self, *_: Any) -> None:
        """Nothing is opened."""

    def __enter__(self) -> "Searching":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def search(self, wording: str, limit: int, mode: str = "dense") -> list[Hit]:
        if wording == "nothing":
            return []
        return [hit("a", {"dense": 0.2, "keywords": 7.0, "hybrid": 0.03}[mode])]


@pytest.mark.parametrize(
    ("asked", "mode", "threshold", "weak"),
    [("nothing", "keywords", 0.0, True), ("a", "dense", 0.3, True), ("a", "dense", 0.1, False),
     ("a", "hybrid", 0.3, True), ("a", "hybrid", 0.1, False), ("a", "keywords", 0.3, True),
     ("a", "keywords", 0.0, False)],
)  # fmt: skip
def test_what_is_weak_is_told_by_meaning_in_every_mode(
    monkeypatch: pytest.MonkeyPatch, asked: str, mode: Any, threshold: float, weak: bool
) -> None:
    monkeypatch.setattr(serve.retrieval, "Searcher", Searching)
    assert Documents("u", "c").find([asked], 1, mode, threshold).weak is weak


def test_wordings_are_the_models_lines_without_their_numbers() -> None:
    assert parse_wordings("1. how to read\n\n- how to read\n* q\n2) open a file\nmore", "q", 2) == [
        "how to read", "open a file",
    ]  # fmt: skip
    assert wordings("q", 1, lambda _: pytest.fail("the model was asked")) == ["q"]


@pytest.mark.parametrize(
    ("answer", "real", "wrong", "kept"),
    [
        ("Cows [1] give milk [2, 9].", [1, 2], [9], "Cows [1] give milk [2]."),
        ("Nothing [7].", [], [7], "Nothing."),
        ("Nothing at all", [], [], "Nothing at all"),
        ("[0] [1][1]", [1], [0], " [1][1]"),
        ("\u725b[1]\u3002", [1], [], "\u725b[1]\u3002"),
        (
            "Use rows[0], then t.columns[12], f(x)[9] and a[1][7].",
            [],
            [],
            "Use rows[0], then t.columns[12], f(x)[9] and a[1][7].",
        ),
        ("`rows`[7] and `x = [9]` [1][8]", [1], [8], "`rows`[7] and `x = [9]` [1]"),
        ("As [2]:\n```\ny = [5]\n```\n", [2], [], "As [2]:\n```\ny = [5]\n```\n"),
    ],
)
def test_citations_point_at_real_passages(answer: str, real: list[int], wrong: list[int], kept: str) -> None:
    assert cited(answer, 2) == (real, wrong)
    assert only_real(answer, 2).strip() == kept.strip()
    assert only_real(answer, 0) == answer


def test_a_template_of_ones_own_gets_the_question_and_the_passages(tmp_path: Path) -> None:
    file = tmp_path / "prompt.jinja"
    file.write_text("{{ question }}|{% for p in passages %}{{ p.number }}:{{ p.text }};{% endfor %}")
    assert prompt(load_template(file), "why?", [hit("a"), hit("b")], 100) == "why?|1:text;2:text;"


@pytest.mark.parametrize("text", ["{{ question }}", "{{ question", "no names"])
def test_a_template_that_leaves_something_out_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompt.jinja").write_text(text)
    with pytest.raises(UserError, match="template"):
        load_template(tmp_path / "prompt.jinja")


def test_a_template_cannot_reach_into_python(tmp_path: Path) -> None:
    from jinja2.exceptions import SecurityError

    file = tmp_path / "prompt.jinja"
    file.write_text("{{ question.__class__.__mro__ }}{{ passages }}")
    with pytest.raises(SecurityError):
        prompt(load_template(file), "q", [], 10)


@settings(deadline=None)
@given(st.integers(0, 2000), st.lists(st.integers(0, 500), max_size=6))
def test_the_passages_fit_their_budget(budget: int, lengths: list[int]) -> None:
    hits = [hit(f"d{i}", text="word " * n) for i, n in enumerate(lengths)]
    bare = prompt(load_template(None), "q", [hit(h.document, text="") for h in hits], budget)
    whole = prompt(load_template(None), "q", hits, budget)
    assert (len(whole) - len(bare)) // 3 <= budget + len(hits)


@pytest.mark.parametrize(
    "messages", [None, [], "x", [{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], [5],
                 [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text", "text": " "}]}]],
)  # fmt: skip
def test_without_a_question_there_is_nothing_to_search(messages: Any) -> None:
    from serve.gateway.errors import ApiError

    with pytest.raises(ApiError) as refused:
        last_question({"messages": messages})
    assert refused.value.status == 400


def test_an_engines_words_are_kept_and_the_clients_are_not() -> None:
    asked = {"messages": [{"role": "user", "content": 'my secret\n"plan"'}], "stop": ["never"], "n": 2}
    raw = json.dumps({"error": {"message": 'CUDA error at: my secret\n"plan"', "type": "user"}})
    assert without_texts(raw, asked) == '{"error": {"message": "CUDA error at: [text]", "type": "user"}}'
    assert without_texts('my secret\n"plan" is too long', asked) == "[text] is too long"
    assert without_texts("the prompt is secret", ["a prompt", "prompt is secret"]) == "the [text]"
    assert without_texts("word " * 1000, ["word " * 2000]) == "[5000 characters]"


def test_a_question_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "What do"}, {"type": "text", "text": "cows give?"}]
    assert last_question({"messages": [{"role": "user", "content": parts}]}) == "What do\ncows give?"


@pytest.mark.parametrize("body", [b"not json", b"[1]", b"{}", b'{"choices":[]}', b'{"choices":null}'])
def test_an_answer_without_choices_is_passed_on_as_it_is(body: bytes) -> None:
    head = {"type": "http.response.start", "status": 200, "headers": []}
    start, last = sent_with_sources([head, {"type": "http.response.body", "body": body, "more_body": False}])
    assert (dict(start["headers"])[b"content-length"], last["body"]) == (str(len(body)).encode(), body)


def test_of_several_answers_the_first_ones_citations_are_told() -> None:
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    part = b'data: {"choices":[{"index":%d,"delta":{"content":"%s"}}]}\n\n'
    body = part % (1, b"Milk [2") + part % (0, b"Milk [1]") + part % (1, b"]") + b"data: [DONE]\n\n"
    got = sent_with_sources([head, {"type": "http.response.body", "body": body}])
    event = got[1]["body"].split(b"\n\n")[3]
    told = json.loads(event.removeprefix(b"data: "))["rag"]
    assert (told["cited"], told["cited_wrongly"]) == ([1], [])


def sent_with_sources(messages: list[Any]) -> list[Any]:
    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message)

    async def work() -> None:
        made = Exchange("r", "t", "p", path="/v1/chat/completions", key=ApiKey("k", "d", "o"))
        adding = WithSources(made, send, [hit("cows")], {"status": "ok"}, 0.0)
        for message in messages:
            await adding(message)

    asyncio.run(work())
    return got


def test_a_whole_answer_gets_its_sources_and_loses_citations_of_nothing() -> None:
    body = b'{"choices":[{"message":{"role":"assistant","content":"Milk [1] and [4]."}}]}'
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"77")]}
    start, last = sent_with_sources([head, {"type": "http.response.body", "body": body, "more_body": False}])
    told = json.loads(last["body"])
    assert dict(start["headers"])[b"content-length"] == str(len(last["body"])).encode()
    assert told["choices"][0]["message"]["content"] == "Milk [1] and."
    assert (told["rag"]["cited"], told["rag"]["cited_wrongly"]) == ([1], [4])
    assert told["sources"][0]["id"] == "cows#0"


def test_a_stream_gets_its_sources_before_its_last_event() -> None:
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    parts = [b'data: {"choices":[{"delta":{"content":"Milk [1]"}}]}\n\n', b"data: [DONE]\n\n"]
    bodies = [{"type": "http.response.body", "body": part, "more_body": True} for part in parts]
    got = sent_with_sources([head, *bodies])
    assert got[1]["body"] == parts[0]
    event, done = got[2]["body"].split(b"\n\n")[:2]
    assert json.loads(event.removeprefix(b"data: "))["rag"]["cited"] == [1]
    assert done == b"data: [DONE]"


def test_an_answer_that_speaks_of_the_last_event_is_not_cut_there() -> None:
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    part = b'data: {"choices":[{"delta":{"content":"It ends with data: [DONE], then"}}]}\n\n'
    got = sent_with_sources([head, {"type": "http.response.body", "body": part + b"data: [DONE]\n\n"}])
    events = got[1]["body"].split(b"\n\n")
    assert events[0] + b"\n\n" == part
    assert "rag" in json.loads(events[1].removeprefix(b"data: "))
    assert events[2] == b"data: [DONE]"


def answered(sources: list[str], numbers: list[int], text: str, status: str = "ok") -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text}}], "total_ms": 50.0,
        "sources": [{"number": i, "id": f"{s}#0", "document": s} for i, s in enumerate(sources, 1)],
        "rag": {"status": status, "cited": numbers, "cited_wrongly": [], "search_ms": 10.0, "answer_ms": 40.0},
    }  # fmt: skip


def test_answers_are_judged_by_what_was_found_cited_and_refused() -> None:
    ask = rag_eval.Question
    questions = [
        ask(question="milk?", relevant=["cows"], answer="Cows give milk"),
        ask(question="honey?", relevant=["bees#0"]),
        ask(question="gold?", relevant=[]),
        ask(question="lost?", relevant=["x"]),
    ]
    answers = [
        answered(["bees", "cows"], [2], "Cows give milk"),
        answered(["bees"], [1], "Bees [1]"),
        answered([], [], "no", "not in the documents"),
        {"error": "503"},
    ]
    summary = rag_eval.judge(questions, answers)
    assert (summary["questions"], summary["failed"]) == (4, 1)
    assert summary["recall_at_2"] == 1.0
    assert summary["ndcg_at_2"] == pytest.approx((1 / np.log2(3) + 1) / 2, abs=1e-4)
    assert (summary["citations_right"], summary["refused_rightly"], summary["refused_wrongly"]) == (1.0, 1.0, 0.0)
    assert (summary["rouge_l"], summary["search_p50_ms"]) == (1.0, 10.0)


@pytest.mark.parametrize("line", ["{", "[]", '{"question": "x"}', '{"question": "", "relevant": []}',
                                  '{"question": "x", "relevant": "d"}'])  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "x", "relevant": []}\n' + line + "\n")
    with pytest.raises(UserError, match=r"questions\.jsonl:2"):
        rag_eval.read_questions(file)


# Watching


def test_the_files_name_the_gateway_and_every_panel_has_a_query(tmp_path: Path, runs_root: Path) -> None:
    config = load(ObserveConfig, None, ["url=https://host:8443/serve", f"folder={tmp_path}"])
    with open_run("serve", "observe", config) as run:
        observe.run(config, run)
    scraped = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"][0]
    assert (scraped["scheme"], scraped["metrics_path"]) == ("https", "/serve/metrics")
    assert scraped["static_configs"] == [{"targets": ["host:8443"]}]
    panels = json.loads((tmp_path / "dashboard.json").read_text())["panels"]
    assert all(panel["targets"][0]["expr"] for panel in panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
