"""``POST /v1/rag/chat/completions``: a chat completion over documents, with its sources.

The last user message is the question. It is sought in the collection, the passages found take its place in the
prompt, and the answer comes with ``sources`` (numbered, with their chunk's id) and ``rag`` (what was cited, how long
each stage took, what was down). In a stream both come in an event before the last. Where the search is down the model
answers without documents; where the model is down the passages are the answer; ``rag.status`` tells which.
"""

import asyncio
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import orjson

from data_pipelines.search import Hit, Mode
from serve.citations import MODEL_DOWN, NOT_FOUND, cited, load_template, only_real, prompt
from serve.gateway.breaker import Breaker
from serve.gateway.errors import JSON, ApiError, bad_request
from serve.gateway.exchange import Exchange
from serve.gateway.fitting import Fitting, aside
from serve.gateway.lines import Lines
from serve.gateway.relay import Send, marks, relay
from serve.gateway.settings import ModelPolicy, RagConfig
from serve.gateway.sse import text_of
from serve.retrieval import WORDINGS, Documents, Found, parse_wordings, source_rows
from workbench.errors import UserError

DONE = re.compile(rb"^data:\s?\[DONE\]", re.MULTILINE)
"""The last event: at the beginning of a line, for an answer may speak of it."""
BREAKER = ModelPolicy(breaker_failures=3, breaker_seconds=10)
log = logging.getLogger("workbench.gateway")


class Rag:
    """The documents behind the endpoint."""

    def __init__(self, config: RagConfig, lines: Lines) -> None:
        self._config = config
        self._lines = lines
        self._fitting = Fitting(lines)
        self._documents = Documents(config.uri, config.collection, config.embedding_model)
        self._template = load_template(config.template)
        self._breaker = Breaker("documents", BREAKER)
        self._searches = ThreadPoolExecutor(1, "documents")  # Milvus Lite takes one at a time

    async def answer(self, exchange: Exchange, send: Send) -> None:
        """Answer ``exchange`` over the documents. ApiError 400: no question, or a mode that they lack."""
        body = exchange.body
        question = last_question(body)
        assert body is not None
        options = body.pop("rag", None) or {}
        mode, queries = _options(options, self._config)
        told: dict[str, Any] = {"status": "ok", "mode": mode}
        begun = time.perf_counter()
        asked = [question]
        if queries > 1:
            asked += await self._wordings(exchange, question, queries - 1)
            told["wordings"] = asked
            told["wordings_ms"] = _since(begun)
        begun = time.perf_counter()
        found = await self._search(asked, mode)
        hits = found.hits if found else None
        told["search_ms"] = _since(begun)
        exchange.path = "/v1/chat/completions"
        if found is None:
            told["status"] = "no documents"
        elif found.weak:
            told["status"] = "not in the documents"
            await whole(exchange, send, NOT_FOUND, [], told)
            return
        else:
            passages = found.hits
            body["messages"][-1]["content"] = await self._fitting.fitted(
                exchange, lambda budget, count: prompt(self._template, question, passages, budget, count)
            )
        begun = time.perf_counter()
        adding = WithSources(exchange, send, hits or [], told, begun)
        try:
            await relay(self._lines, exchange, adding)
        except ApiError as error:
            if error.status < 500 or not hits or exchange.started:
                raise
            told["status"] = "no model"
            exchange.error, exchange.reason = error.kind, exchange.reason or error.message
            exchange.served = exchange.fallback_from = ""
            lines = [f"[{i}] {hit.title}: {hit.text}" for i, hit in enumerate(hits, 1)]
            await whole(exchange, send, "\n\n".join([MODEL_DOWN, *lines]), hits, told)

    async def _search(self, asked: list[str], mode: Mode) -> Found | None:
        """The passages, or None where the documents cannot be asked in time.

        Raises ApiError 400 where they cannot be asked in this mode.
        """
        try:
            trying = self._breaker.enter()
        except ApiError:
            return None
        try:
            loop = asyncio.get_running_loop()
            wanted = asked, self._config.limit, mode, self._config.threshold
            work = loop.run_in_executor(self._searches, self._documents.find, *wanted)
            async with asyncio.timeout(self._config.timeout):
                found = await work
            self._breaker.answered()
            return found
        except Exception as error:
            if isinstance(error, UserError) and str(error).startswith("mode:"):
                raise bad_request("These documents have no index of words: give rag.mode dense.", "rag.mode") from None
            self._breaker.failed()
            log.warning("the documents cannot be searched: %s: %s", type(error).__name__, error)
            return None
        finally:
            self._breaker.leave(trying)

    async def _wordings(self, exchange: Exchange, question: str, count: int) -> list[str]:
        """Other wordings by the model that will answer; none where it cannot."""
        text = WORDINGS.format(count=count, question=question)
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 64 * count}
        told = await aside(self._lines, exchange, "/v1/chat/completions", body)
        try:
            written = text_of((told or {})["choices"][0])
        except LookupError:
            return []
        return parse_wordings(written, question, count)


class WithSources:
    """A ``send`` that adds the sources to what it passes on."""

    def __init__(self, exchange: Exchange, send: Send, hits: list[Hit], told: dict[str, Any], begun: float) -> None:
        self._exchange, self._send, self._hits, self._told, self._begun = exchange, send, hits, told, begun
        self._head: Any = None
        self._stream = False
        self._text: list[str] = []

    async def __call__(self, message: Any) -> None:
        """Pass a message on: a stream's events with one more before the last, a whole answer with two more fields."""
        if message["type"] == "http.response.start":
            self._stream = any(
                v.startswith(b"text/event-stream") for n, v in message["headers"] if n == b"content-type"
            )
            self._head = message
            if self._stream:
                await self._send(message)
            return
        body = message["body"]
        if self._stream:
            message = {**message, "body": self._with_event(body)}
        elif self._head["status"] == 200:
            body = self._with_fields(body)
            headers = [(n, v) for n, v in self._head["headers"] if n != b"content-length"]
            await self._send({**self._head, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {**message, "body": body}
        else:
            await self._send(self._head)
        await self._send(message)

    def _with_event(self, body: bytes) -> bytes:
        for line in body.split(b"\n"):
            if line.startswith(b'data: {"') and b'"content"' in line:
                self._text += [text_of(choice) for choice in _choices(line[6:]) if choice.get("index", 0) == 0]
        if (done := DONE.search(body)) is None:
            return body
        place = done.start()
        event = {"object": "chat.completion.chunk", "choices": [], **self._more("".join(self._text))}
        return body[:place] + b"data: " + orjson.dumps(event) + b"\n\n" + body[place:]

    def _with_fields(self, body: bytes) -> bytes:
        if not (choices := _choices(body)):
            return body  # no answer that sources could belong to
        more = self._more(text_of(choices[0]))
        for choice in choices:
            if isinstance(choice.get("message"), dict) and choice["message"].get("content"):
                choice["message"]["content"] = only_real(choice["message"]["content"], len(self._hits))
        return orjson.dumps({**orjson.loads(body), "choices": choices, **more})

    def _more(self, text: str) -> dict[str, Any]:
        real, wrong = cited(text, len(self._hits))
        self._told |= {"cited": real, "cited_wrongly": wrong, "answer_ms": _since(self._begun)}
        return {"sources": source_rows(self._hits), "rag": self._told}


def _choices(data: bytes) -> list[dict[str, Any]]:
    """The choices of an answer or of a chunk of one; none where it is something else."""
    try:
        choices = orjson.loads(data)["choices"]
    except (ValueError, LookupError, TypeError):
        return []
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


async def whole(exchange: Exchange, send: Send, text: str, hits: list[Hit], told: dict[str, Any]) -> None:
    """Send an answer that no model wrote, whole or as a stream, as the client asked."""
    exchange.started, exchange.status, exchange.answer = True, 200, text
    head = {"id": f"chatcmpl-{exchange.request_id}", "created": int(time.time()), "model": exchange.asked}
    more = {"sources": source_rows(hits), "rag": told}
    finish = {"index": 0, "finish_reason": "stop"}
    if exchange.streaming:
        head["object"] = "chat.completion.chunk"
        chunk = {**head, "choices": [{**finish, "delta": {"role": "assistant", "content": text}}]}
        events = [chunk, {**head, "choices": [], **more}]
        body = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        kind = (b"content-type", b"text/event-stream")
    else:
        head["object"] = "chat.completion"
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        message = {"role": "assistant", "content": text}
        body = orjson.dumps({**head, "choices": [{**finish, "message": message}], "usage": usage, **more})
        kind = JSON
    headers = [kind, (b"content-length", str(len(body)).encode()), *marks(exchange)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def last_question(body: dict[str, Any] | None) -> str:
    """The text of the last message, which must be the user's: a string, or parts that are all text.

    Raises ApiError 400.
    """
    messages = (body or {}).get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) and last.get("role") == "user" else None
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        content = "\n".join(texts) if texts and len(texts) == len(content) else None
    if not isinstance(content, str):
        raise bad_request("The last message must be the user's question, as text.", "messages")
    if not content.strip():
        raise bad_request("The question is empty.", "messages")
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _options(options: Any, config: RagConfig) -> tuple[Mode, int]:
    """(mode, queries) of a request, where it has its own. Raises ApiError 400."""
    if not isinstance(options, dict) or options.keys() - {"mode", "queries"}:
        raise bad_request("rag takes mode and queries.", "rag")
    mode, queries = options.get("mode", config.mode), options.get("queries", config.queries)
    if mode not in ("dense", "keywords", "hybrid"):
        raise bad_request("rag.mode is dense, keywords or hybrid.", "rag.mode")
    if isinstance(queries, bool) or not isinstance(queries, int) or not 1 <= queries <= 8:
        raise bad_request("rag.queries is a number from 1 to 8.", "rag.queries")
    return cast(Mode, mode), queries


def _since(begun: float) -> float:
    return round(1000 * (time.perf_counter() - begun), 2)
