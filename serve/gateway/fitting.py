"""A prompt over passages, cut to the model's context by the engine's own count of tokens."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from serve.citations import guess_tokens
from serve.gateway.errors import ApiError, bad_request
from serve.gateway.exchange import Exchange
from serve.gateway.lines import Lines
from serve.gateway.relay import relay

CONTEXT = 4096
"""Where neither the listing nor the engine tells it."""
ANSWER_TOKENS = 256
TEMPLATE_TOKENS = 48
MESSAGE_TOKENS = 8
"""What the chat template adds: no endpoint counts it for us."""
ATTEMPTS = 4

Render = Callable[[int, Callable[[str], int]], str]
"""The prompt with its passages cut to so many tokens, by a count of a text's tokens."""


async def aside(lines: Lines, exchange: Exchange, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """What the model of ``exchange`` answers to another question on its behalf; None where it does not.

    Its cost is the exchange's.
    """
    side = Exchange(f"{exchange.request_id}-a", exchange.trace_id, exchange.traceparent, path, exchange.key)
    side.body, side.asked = {"model": exchange.asked, **body}, exchange.asked
    parts: list[bytes] = []

    async def keep(message: Any) -> None:
        parts.append(message.get("body", b""))

    try:
        await relay(lines, side, keep)
        told = orjson.loads(b"".join(parts)) if side.status == 200 else None
    except (ApiError, orjson.JSONDecodeError):
        return None
    finally:
        exchange.cost += side.cost
        exchange.energy_wh += side.energy_wh
        exchange.side_tokens += side.prompt_tokens + side.completion_tokens
    return told if isinstance(told, dict) else None


class Fitting:
    """Fits prompts to models, and remembers their contexts."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._contexts: dict[str, int] = {}

    async def fitted(self, exchange: Exchange, render: Render) -> str:
        """The prompt of ``render`` that takes the last message's place, with all that fits of its passages.

        A text has at most as many tokens as bytes, so a prompt that is short for its context is not counted.

        Raises ApiError 400 where nothing of the passages fits, or ``tools`` is no list.
        """
        body = exchange.body or {}
        context = await self._context(exchange)
        answer = body.get("max_completion_tokens") or body.get("max_tokens")
        taken = answer if isinstance(answer, int) else min(ANSWER_TOKENS, context // 4)
        messages, tools = body["messages"], body.get("tools") or []
        if not isinstance(tools, list):
            raise bad_request("tools is a list of functions that the model may call.", "tools")
        others = "\n".join(orjson.dumps(other).decode() for other in [*messages[:-1], *tools])
        room = context - taken - MESSAGE_TOKENS * len(messages) - TEMPLATE_TOKENS
        text, bare = render(context, guess_tokens), render(0, guess_tokens)
        if len(f"{others}{text}".encode()) <= room:
            return text
        whole, fixed = await self._count(exchange, context, others + text, others + bare)
        per_character = max(whole - fixed, 1) / max(len(text) - len(bare), 1)
        budget = room - fixed
        for _ in range(ATTEMPTS):
            if whole <= room or budget < 1:
                break
            text = render(budget, lambda passage: int(len(passage) * per_character) + 1)
            [whole] = await self._count(exchange, context, others + text)
            budget -= max(whole - room, 0) + budget // 16
        if whole <= room:
            return text
        raise bad_request(
            f"The messages and the answer's length leave no room for the documents in the {context} tokens of the "
            "model's context: lower max_tokens or shorten the messages.",
            "max_tokens",
        )

    async def _context(self, exchange: Exchange) -> int:
        """As the listing tells it, or the engine's ``/tokenize``, or a cautious guess."""
        model = exchange.asked
        if model not in self._contexts:
            card = (await self._lines.cards()).get(model) or {}
            told = (card.get("metadata") or {}).get("max_request_context_length") or card.get("max_model_len")
            if not told and (counted := await aside(self._lines, exchange, "/tokenize", {"prompt": "x"})):
                told = counted.get("max_model_len")
            if not told:
                return CONTEXT  # it may tell the next time
            self._contexts[model] = int(told)
        return self._contexts[model]

    async def _count(self, exchange: Exchange, context: int, *texts: str) -> list[int]:
        """Tokens of each text: the engine's own count, or a cautious guess where it has no ``/tokenize``.

        An engine counts no text that passes its context, so a long one is counted in pieces.
        """

        async def tokens(piece: str) -> int:
            told = await aside(self._lines, exchange, "/tokenize", {"prompt": piece})
            return told["count"] if told and isinstance(told.get("count"), int) else guess_tokens(piece)

        counts = []
        for data in (text.encode() for text in texts):
            size = context // 2
            pieces = [data[start : start + size].decode(errors="replace") for start in range(0, len(data), size)]
            counts.append(sum(await asyncio.gather(*map(tokens, pieces))))
        return counts
