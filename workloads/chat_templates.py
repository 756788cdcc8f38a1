"""Chat templates by name, the model's own or a file, and where in a rendered conversation the answers are."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workloads.sources import read_tokenizer

Turns = Sequence[dict[str, str]]
Span = tuple[int, int]
"""Characters ``[start, end)`` of a text."""

OF_ITS_CODE = (TypeError, ValueError, LookupError, ArithmeticError)
"""What a template's own expressions raise, beside Jinja's errors."""


@dataclass(frozen=True)
class NamedTemplate:
    """A Jinja chat template; the tokens that a tokenizer must have for it; the one of them that ends an answer, empty
    where that is the tokenizer's own end token."""

    jinja: str
    tokens: tuple[str, ...] = ()
    end: str = ""


def _with_headers(user: str, assistant: str) -> str:
    """Plain text: a line before each message says whose it is, and the end token closes an answer."""
    return (
        "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ '" + assistant + "' + message['content'] + eos_token + '\\n' }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% else %}{{ '" + user + "' + message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '" + assistant + "' }}{% endif %}"
    )


TEMPLATES = {
    "alpaca": NamedTemplate(_with_headers("### Instruction:\\n", "### Response:\\n")),
    "plain": NamedTemplate(_with_headers("User:\\n", "Assistant:\\n")),
    "chatml": NamedTemplate(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": NamedTemplate(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
}
"""The first two are plain text, for any tokenizer with an end token; the others are what their models know."""


def load_tokenizer(base: str, chat_template: str = "") -> Any:
    """The fast tokenizer of ``base`` with its own chat template, one of ``TEMPLATES``, or that in a Jinja file.

    A named template that ends answers with a token of its own makes it the tokenizer's end token, so that whatever
    generates with the saved tokenizer stops there. Raises UserError for a tokenizer that cannot be read, and where
    template and tokenizer do not go together.
    """
    tokenizer = read_tokenizer("base", base)
    if not tokenizer.is_fast:
        raise UserError(f"{base}: its tokenizer does not say which text each token is of; convert it to a fast one")
    if chat_template in TEMPLATES:
        named = TEMPLATES[chat_template]
        missing = [token for token in named.tokens if token not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"chat_template {chat_template} needs the token {missing[0]}, which the tokenizer of {base} lacks: "
                "give chat_template=alpaca or plain"
            )
        tokenizer.chat_template = named.jinja
        if named.end:
            tokenizer.eos_token = named.end
    elif chat_template:
        tokenizer.chat_template = _read(chat_template)
    elif not tokenizer.chat_template:
        raise UserError(
            f"{base} has no chat template: give chat_template={', '.join(TEMPLATES)}, or a Jinja file that has one"
        )
    if not tokenizer.eos_token:
        raise UserError(f"the tokenizer of {base} has no end token, so no answer would ever end: give it an eos_token")
    return tokenizer


def end_generation(model: Path) -> None:
    """Let generation with the model saved at ``model`` stop at its tokenizer's end token, which a named template may
    have changed, beside the end tokens that it knows."""
    from transformers import AutoTokenizer, GenerationConfig

    settings = GenerationConfig.from_pretrained(model)
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    if end not in known:
        settings.eos_token_id = [*(token for token in known if token is not None), end]
        settings.save_pretrained(model)


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        near = difflib.get_close_matches(chat_template, TEMPLATES, 1)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(TEMPLATES)} or the path of a Jinja file"
        raise UserError(f"chat_template: '{chat_template}' is no template and no readable file; {hint}") from None


def render(turns: Turns, tokenizer: Any, prompt: bool = False) -> str:
    """The conversation as text, with ``prompt`` up to where an answer begins. Raises UserError where the template
    refuses it."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=False)
    except (TemplateError, *OF_ITS_CODE) as error:
        raise UserError(f"the chat template does not take this conversation: {error}") from None
    return text


def answers_in(turns: Turns, tokenizer: Any, last_alone: bool = False) -> tuple[str, list[Span]]:
    """The rendered conversation, and the span of each answer in it (or of the last), with the token that ends it but no
    blank after.

    A template with ``{% generation %}`` says itself which those are. For any other an answer begins where the prompt
    for it ends, and ends with what the template puts behind it. Raises UserError where the text of the whole does not
    begin with that prompt, as then the model would be trained on another text than it is asked with.
    """
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        text, spans = _marked(turns, tokenizer, template)
        return text, spans[-1:] if last_alone else spans
    text, spans = render(turns, tokenizer), []
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    for place in places[-1:] if last_alone else places:
        before = render(turns[:place], tokenizer, prompt=True)
        if not text.startswith(before):
            raise UserError(
                "the chat template writes a prompt otherwise once it is answered, so the answers cannot be told: "
                f"it asks {_end(before)}; name another, such as chat_template=alpaca"
            )
        start = len(before)
        end = _end_of(render(turns[: place + 1], tokenizer), text, start, turns[place]["content"].strip())
        spans.append((start, start + len(text[start:end].rstrip())))
    if not _closed(text, spans[-1], turns, tokenizer):
        text = text[: spans[-1][1]] + tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _marked(turns: Turns, tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(turns)], chat_template=template, return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
    except (TemplateError, *OF_ITS_CODE) as error:
        raise UserError(f"the chat template does not take this conversation: {error}") from None
    return texts[0], [(start, end) for start, end in spans[0]]


def _end_of(so_far: str, text: str, start: int, content: str) -> int:
    """Where the answer that begins at ``start`` ends, closing token included. ``so_far`` is rendered up to it."""
    if text.startswith(so_far):
        return len(so_far)
    # The last answer is written otherwise than earlier ones (with its thoughts, say): what closes it is the same.
    closing = so_far[so_far.rfind(content) + len(content) :]
    found = text.find(content, start)
    if found < 0 or not text.startswith(closing, found + len(content)):
        raise UserError("the chat template changes an answer once it is followed by others: give train_on=last_answer")
    return found + len(content) + len(closing)


def _closed(text: str, span: Span, turns: Turns, tokenizer: Any) -> bool:
    """Whether the template puts anything behind the last answer but blanks."""
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"][-1].rstrip()
    return not text[span[0] : span[1]].endswith(said) or said.endswith(tokenizer.eos_token)


def _end(text: str) -> str:
    return repr(text[-40:])
