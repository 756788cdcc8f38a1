"""Instruction sets in the three forms that they come in, read into one: messages of a role and a content.

alpaca    {"instruction": ..., "input": ..., "output": ...}
sharegpt  {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
chat      {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["text", "alpaca", "sharegpt", "chat"]
"""How a row holds its document: one text, or an exchange in one of the three forms."""

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class SchemaError(ValueError):
    """A row that is not of the form it should have; the message is the reason that is written down."""


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class ExchangeColumns:
    """Which columns hold the parts of an exchange; ``messages`` is empty for the usual name of the form."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    messages: str = ""

    def needed(self, form: Form) -> list[str]:
        """The columns without which no row of ``form`` can be read."""
        if form == "alpaca":
            return [self.instruction, self.output]
        return [] if form == "text" else [self.messages or USUAL[form]]

    def wanted(self, form: Form) -> list[str]:
        """The columns that are read, where they are there."""
        return [*self.needed(form), self.input] if form == "alpaca" else self.needed(form)


USUAL = {"sharegpt": "conversations", "chat": "messages"}


def looks_like(columns: Sequence[str]) -> Form | None:
    """The form that a table with these columns has, None for plain text."""
    present = set(columns)
    if {"instruction", "output"} <= present:
        return "alpaca"
    if "conversations" in present:
        return "sharegpt"
    return "chat" if "messages" in present else None


def read_exchange(record: Mapping[str, Any], form: Form, columns: ExchangeColumns) -> list[Message]:
    """The messages of one row. Raises SchemaError where it is not of ``form``."""
    if form == "alpaca":
        instruction = _text(record.get(columns.instruction), columns.instruction)
        given = _text(record.get(columns.input) or "", columns.input)
        output = _text(record.get(columns.output), columns.output)
        if not instruction.strip():
            raise SchemaError(f"{columns.instruction} is empty")
        return [
            Message("user", f"{instruction}\n\n{given}" if given.strip() else instruction),
            Message("assistant", output),
        ]
    name = columns.messages or USUAL[form]
    turns = record.get(name)
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise SchemaError(f"{name} is missing" if turns is None else f"{name} is no list of messages")
    who, what = ("from", "value") if form == "sharegpt" else ("role", "content")
    messages = [_message(turn, who, what) for turn in turns]
    _check_order(messages)
    return messages


def _message(turn: Any, who: str, what: str) -> Message:
    if not isinstance(turn, Mapping):
        raise SchemaError("a message is no object")
    role = turn.get(who)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise SchemaError(f"a message has no '{who}'" if role is None else "a message has an unknown role")
    content = turn.get(what)
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, of which only text is read
        content = "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    if not content and (calls := turn.get("tool_calls")):
        content = json.dumps(calls, ensure_ascii=False, default=str)
    return Message(ROLES[role.lower()], _text(content, what))


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise SchemaError("no message of a user")
    if "assistant" not in roles:
        raise SchemaError("no answer")
    if "system" in roles[1:]:
        raise SchemaError("a system message is not the first")
    spoken = [role for role in roles if role in ("user", "assistant")]
    if spoken[0] != "user":
        raise SchemaError("an answer stands before the question")
    if any(a == b == "user" for a, b in itertools.pairwise(roles)):
        raise SchemaError("two questions in a row")


def _text(value: Any, name: str) -> str:
    if value is None:
        raise SchemaError(f"{name} is missing")
    if not isinstance(value, str):
        raise SchemaError(f"{name} is no text but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, Sequence) else "something else"
