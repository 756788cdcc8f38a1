"""Judge answers over documents by a file of questions: what was found, what was written, what was cited, how long.

    workbench serve rag-eval questions=questions.jsonl model=tuned

Each line: {"question": "...", "relevant": ["d1", "d7#2"], "answer": "..."}. ``relevant`` names documents or chunks
(DOCUMENT#POSITION); an empty list says that the documents have no answer, and then saying so is right. ``answer`` is
optional, for ROUGE-L and BLEU. The questions go through ``/v1/rag/chat/completions``, as a user's would.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipelines.judgements import evaluate
from serve.endpoint import DEFAULT_URL, choose_model, open_client, served_models
from serve.intervals import estimate
from serve.similarity import bleu, rouge_l
from workbench.config import Config, InputPath, OutputPath
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

STAGES = ("wordings_ms", "search_ms", "answer_ms", "total_ms")
DEPTH = 10
"""Sources of an answer that are judged at most."""


class Question(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(min_length=1)
    relevant: list[str]
    answer: str = ""


class RagEvalConfig(Config):
    """Which questions, asked of whom."""

    questions: InputPath = Field(description="JSONL of questions")
    base_url: str = Field(default=DEFAULT_URL, description="The gateway")
    model: str | None = Field(default=None, description="Served model; default: the endpoint's last")
    api_key_file: OutputPath | None = Field(default=None, description="File of the API key; default as for 'ask'")
    search: Literal["dense", "keywords", "hybrid"] | None = Field(default=None, description="Instead of the gateway's")
    queries: int | None = Field(default=None, ge=1, le=8, description="Wordings, instead of the gateway's")
    max_tokens: int = Field(default=256, ge=1, description="Longest answer")
    timeout: float = Field(default=120.0, gt=0, description="Seconds for one question")


def check(config: RagEvalConfig) -> None:
    """Raise UserError for a file that is none."""
    read_questions(config.questions)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises UserError naming the line that is none."""
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_question(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions: {path} cannot be read: {error}") from None
    if not found:
        raise UserError(f"questions: {path} has none")
    return found


def _question(line: str, place: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f'questions: {place}: {where or "line"}: {first["msg"]}; expected {{"question": "...", '
                        '"relevant": ["DOCUMENT"], "answer": "..."}') from None  # fmt: skip


def run(config: RagEvalConfig, run: Run) -> Summary:
    """Ask all questions, one after the other, and judge. Raises Failure where none is answered."""
    questions = read_questions(config.questions)
    run.input("questions", config.questions)
    with open_client(config.base_url, config.api_key_file, config.timeout) as client:
        model = choose_model(served_models(client), config.model)
        key = client.api_key
    options = {k: v for k, v in (("mode", config.search), ("queries", config.queries)) if v is not None}
    answers = []
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=config.timeout) as http:
        for question in questions:
            answers.append(_ask(http, config, model, question.question, options))
    if all("error" in answer for answer in answers):
        raise Failure(f"no question was answered: {answers[0]['error']}")
    summary = judge(questions, answers)
    _report(run, questions, answers)
    for name, value in summary.items():
        run.say(f"{name}: {value}")
    return {"model": model, **summary}


def _ask(http: httpx.Client, config: RagEvalConfig, model: str, question: str, options: dict[str, Any]) -> Any:
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": config.max_tokens,
        "temperature": 0, "rag": options,
    }  # fmt: skip
    begun = time.perf_counter()
    try:
        answer = http.post(f"{config.base_url.rstrip('/')}/rag/chat/completions", json=body)
        told = answer.json()
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if answer.status_code != 200:
        return {"error": f"{answer.status_code}: {told.get('error', {}).get('message', '')}"}
    return told | {"total_ms": 1000 * (time.perf_counter() - begun)}


def judge(questions: list[Question], answers: list[Any]) -> Summary:
    """All measures; those over questions that the documents answer are over them alone."""
    pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if "error" not in a]
    answerable = [(q, a) for q, a in pairs if q.relevant]
    summary: Summary = {"questions": len(questions), "failed": len(questions) - len(pairs)}
    if answerable:
        judged = {str(i): dict.fromkeys(q.relevant, 1) for i, (q, _) in enumerate(answerable)}
        rankings = {str(i): _ranking(q, a["sources"]) for i, (q, a) in enumerate(answerable)}
        measured = evaluate(judged, rankings)
        depth = min(DEPTH, max(len(a["sources"]) for _, a in answerable))  # the gateway's rag.limit as a rule
        summary |= {f"{name}_at_{depth}": measured[f"{name}_at_{DEPTH}"] for name in ("recall", "ndcg")}
        summary["mrr"] = measured["mrr"]
        summary["refused_wrongly"] = _share([a["rag"]["status"] == "not in the documents" for _, a in answerable])
        cited = [_cited(q, a) for q, a in answerable if a["rag"].get("cited")]
        summary["answers_that_cite"] = _share([bool(a["rag"].get("cited")) for _, a in answerable])
        if cited:
            summary["citations_right"] = _share([right for each in cited for right in each])
        summary["citations_of_nothing"] = sum(len(a["rag"].get("cited_wrongly", [])) for _, a in answerable)
    if unanswerable := [a for q, a in pairs if not q.relevant]:
        summary["refused_rightly"] = _share([a["rag"]["status"] == "not in the documents" for a in unanswerable])
    if texts := [(q.answer, _text(a)) for q, a in answerable if q.answer]:
        scores = estimate([rouge_l(*pair) for pair in texts], list(range(len(texts))))
        summary |= {"rouge_l": round(scores.mean, 4), "rouge_l_95": f"{scores.low:.3f} to {scores.high:.3f}"}
        summary["bleu"] = round(bleu([reference for reference, _ in texts], [text for _, text in texts]), 2)
    for stage in STAGES:
        if times := [a.get(stage, a["rag"].get(stage)) for _, a in pairs if a.get(stage, a["rag"].get(stage))]:
            for q in (50, 95):
                summary[f"{stage.removesuffix('_ms')}_p{q}_ms"] = round(float(np.percentile(times, q)), 1)
    return summary


def _names(question: Question, source: dict[str, Any]) -> str:
    """The source as the question's judgements name it: its chunk or its document."""
    return str(source["id"] if source["id"] in question.relevant else source["document"])


def _ranking(question: Question, sources: list[dict[str, Any]]) -> dict[str, float]:
    """Rank as score, best first, each document or chunk once."""
    ranking: dict[str, float] = {}
    for source in sources:
        ranking.setdefault(_names(question, source), -float(source["number"]))
    return ranking


def _cited(question: Question, answer: Any) -> list[bool]:
    sources = {source["number"]: source for source in answer["sources"]}
    return [_names(question, sources[number]) in question.relevant for number in answer["rag"]["cited"]]


def _text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"] or "")


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


def _report(run: Run, questions: list[Question], answers: list[Any]) -> None:
    import plotly.graph_objects as go

    rows = [
        {"question": q.question, "error": a["error"]} if "error" in a else
        {"question": q.question, "status": a["rag"]["status"], "answer": _text(a),
         "found": ", ".join(_names(q, s) for s in a["sources"]), "relevant": ", ".join(q.relevant),
         "cited": str(a["rag"].get("cited", []))}
        for q, a in zip(questions, answers, strict=True)
    ]  # fmt: skip
    run.report.table("Questions", rows)
    figure = go.Figure()
    for stage in STAGES:
        times = [a.get(stage, a["rag"].get(stage)) for a in answers if "error" not in a]
        figure.add_box(y=[t for t in times if t], name=stage.removesuffix("_ms"))
    figure.update_layout(yaxis_title="ms")
    run.report.figure("Time by stage", figure)
