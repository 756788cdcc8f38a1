"""One request of a client and what became of it: what the relay fills in, and metrics, logs and bills read."""

import re
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from serve.gateway.api_keys import ApiKey
from serve.gateway.asgi import write_form
from serve.gateway.errors import bad_request

if TYPE_CHECKING:
    from starlette.datastructures import FormData

ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
TRACE = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
"""A traceparent of https://www.w3.org/TR/trace-context."""
Body = dict[str, Any]
DEEP = 200
"""With fewer brackets than this a body cannot be nested too deeply."""


@dataclass
class Exchange:
    """Times are seconds of ``time.perf_counter``, ``arrived`` of the Unix clock."""

    request_id: str
    trace_id: str
    traceparent: str
    path: str
    key: ApiKey
    content_type: bytes = b"application/json"
    raw: bytes = b""
    body: Body | None = None
    form: "FormData | None" = None
    """In place of ``body`` where the request is a multipart form."""
    asked: str = ""
    admitted: bool = False
    """Within its key's limits: from here on it is the model's matter."""
    served: str = ""
    variant_of: str = ""
    arrived: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    status: int = 0
    error: str = ""
    reason: str = ""
    started: bool = False
    queued_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    total_s: float = 0.0
    attempts: int = 0
    fallback_from: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    side_tokens: int = 0
    """Of requests that the gateway made for this one: other wordings of a question."""
    used_s: float = 0.0
    cost: float = 0.0
    energy_wh: float = 0.0
    answer: str | None = None
    """Kept only where logs or records want texts."""
    passed_on: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Headers of the client's that the engine gets."""
    extra_headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def streaming(self) -> bool:
        """Whether the client asked for a stream in so many words."""
        return self.body is not None and self.body.get("stream") is True

    @property
    def user(self) -> str:
        """Whom the client asks for, by its own name for them; empty where it does not tell."""
        body = self.body or {}
        return str(body.get("user") or body.get("safety_identifier") or "")

    @property
    def texts(self) -> list[Any]:
        """All that the client sent but the name of a model."""
        fields = self.form.multi_items() if self.form else (self.body or {}).items()
        return [value for name, value in fields if name != "model"]

    @property
    def asked_for_usage(self) -> bool:
        """Whether the client wants the usage at the end of its stream."""
        options = (self.body or {}).get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    @property
    def inter_token_s(self) -> float | None:
        """Seconds a token after the first, or None for fewer than two."""
        if self.first_token_s is None or self.last_token_s is None or self.completion_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.completion_tokens - 1)

    def use_usage(self, usage: Body, chunks: int = 0) -> None:
        """Note the engine's count of tokens, or without one a count of chunks and a guess of the prompt."""
        if usage:
            counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            self.prompt_tokens, self.completion_tokens = (n if isinstance(n, int) else 0 for n in counts)
        elif chunks:
            self.prompt_tokens, self.completion_tokens = len(self.raw) // 4, chunks

    def body_for(self, model: str, *, own: bool) -> bytes:
        """The body as the engine gets it: its name of the model, our id where it is our own, usage in a stream.

        A form that names this model already goes as it came.
        """
        if self.body is None:
            if self.form is None or self.form.getlist("model") == [model]:
                return self.raw
            return write_form(self.form, self.content_type, model)
        body = {**self.body, "model": model}
        if own and self.path in ("/v1/chat/completions", "/v1/completions"):
            body["request_id"] = self.request_id
        if self.streaming and isinstance(body.get("stream_options") or {}, dict):
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return orjson.dumps(body)


def new_ids(request_id: str, traceparent: str) -> tuple[str, str, str]:
    """(request id, trace id, traceparent) from what the client sent, made where that is nothing or malformed.

    A client's id gets a suffix, because engines refuse two requests of one id at once.
    """
    given = request_id if ID.fullmatch(request_id) else uuid.uuid4().hex
    found = TRACE.fullmatch(traceparent)
    trace, flags = (found[1], found[3]) if found else (secrets.token_hex(16), "01")
    return f"{given}-{secrets.token_hex(3)}", trace, f"00-{trace}-{secrets.token_hex(8)}-{flags}"


def parse(raw: bytes) -> Body:
    """The JSON object of a body. Raises ApiError 400."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The body is no valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise bad_request("The body is no JSON object.")
    if raw.count(b"[") + raw.count(b"{") > DEEP:
        _check_depth(body)
    return body


def _check_depth(body: Body) -> None:
    """Raise ApiError 400 for a body that can be read but not written again: ``orjson`` writes 254 levels."""
    try:
        orjson.dumps([[body]])  # logs and records put it one deeper
    except orjson.JSONEncodeError:
        raise bad_request("The body is nested too deeply.") from None
