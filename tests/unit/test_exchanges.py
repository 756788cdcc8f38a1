"""What an instruction set's audit says of an exchange."""

import json
from typing import Any

import pytest

from data_pipelines.columns import Columns
from data_pipelines.exchanges import flags_of, keys_of


def said(*turns: dict[str, Any]) -> list[list[str]]:
    """The messages of an exchange as the audit has them."""
    asked = {"role": "user", "content": "What is the weather in Oslo?"}
    messages: list[list[str]] = json.loads(Columns(form="chat").row({"messages": [asked, *turns]}, "p").conversation)
    return messages


def call(city: str, content: str | None = None) -> dict[str, Any]:
    """An answer that calls a tool."""
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_of_a_tool_is_an_answer(content: str | None) -> None:
    messages = said(call("Oslo", content))
    assert "empty-output" not in flags_of(messages)
    assert "Oslo" in messages[1][1]
    assert keys_of(messages)[:2] == keys_of(said(call("Oslo", content)))[:2]
    assert keys_of(messages)[1] != keys_of(said(call("Rome", content)))[1]


def test_an_answer_without_words_is_empty() -> None:
    assert flags_of(said({"role": "assistant", "content": " "})) == ["empty-output"]
