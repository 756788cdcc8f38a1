"""Server-sent events of a streamed answer: when its tokens came and what it used, without touching their bytes.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re
from typing import Any

import orjson

END = re.compile(rb"\r?\n\r?\n")
TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content|arguments)":\s?"([^"])')
"""A chunk that brings text: a non-empty string under one of the fields that hold it."""
CHOICE = re.compile(rb'"choices":\s?\[\s?\{')
NO_TOKEN = re.compile(rb'"role":\s?"|"finish_reason":\s?"')
"""A choice that tells of no token: its opening or its end. Any other is a token, also without text: an engine sends so
a token that is the first half of a character."""


class Events:
    """Splits a stream of bytes into events and notes what they tell.

    ``hide_usage`` removes the event that holds the usage alone, which the gateway asked for and the client did not.
    """

    def __init__(self, hide_usage: bool) -> None:
        self._hide_usage = hide_usage
        self._rest = b""
        self.chunks = 0
        self.usage: dict[str, Any] = {}
        self.done = False
        self.error: dict[str, Any] | None = None
        self.text: list[str] | None = None
        """Set to a list to keep the text of the first choice."""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """The bytes to pass on now, and how many events of them bring a token. An event is passed on whole."""
        self._rest += data
        out, new = [], 0
        while (end := END.search(self._rest)) is not None:
            event, self._rest = self._rest[: end.end()], self._rest[end.end() :]
            keep, brings_token = self._note(event)
            new += brings_token
            if keep:
                out.append(event)
        self.chunks += new
        return b"".join(out), new

    def _note(self, event: bytes) -> tuple[bool, bool]:
        if not event.startswith(b"data:"):
            return True, False
        data = event[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return True, False
        brings_text = TEXT.search(data) is not None
        brings_token = brings_text or (CHOICE.search(data) is not None and NO_TOKEN.search(data) is None)
        if b'"usage"' in data or b'"error"' in data or (self.text is not None and brings_text):
            return self._read(data), brings_token
        return True, brings_token

    def _read(self, data: bytes) -> bool:
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return True
        if not isinstance(chunk, dict):
            return True
        self.usage = chunk.get("usage") or self.usage
        self.error = chunk.get("error") or self.error
        choices = chunk.get("choices")
        if self.text is not None:
            self.text += [text_of(choice) for choice in choices or [] if choice.get("index", 0) == 0]
        return not (self._hide_usage and chunk.get("usage") and choices == [])


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or a chunk's, chat or completion."""
    inner = choice.get("delta") or choice.get("message") or choice
    return str(inner.get("content") or inner.get("text") or "")


def error_event(fields: dict[str, Any]) -> bytes:
    """An error as an event: the status is long sent, so this is how a stream tells that it ends badly."""
    return b"data: " + orjson.dumps({"error": fields}) + b"\n\n"
