"""The prompt that numbers its passages, and the numbers that an answer cites."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.search import Hit
from serve.passages import trim
from workbench.errors import UserError

NUMBERS = r"\[\d+(?:\s*,\s*\d+)*\]"
CITATION = re.compile(
    rf"```.*?(?:```|\Z)|`[^`\n]+`(?:{NUMBERS})*|[\w\])](?:{NUMBERS})+|\s?(?P<cited>{NUMBERS})", re.ASCII | re.DOTALL
)
"""Code and what is indexed (``rows[0]``, ``f(x)[1]``), which are passed over, or a citation, which is ``cited``."""
NOT_FOUND = "The documents do not answer this question."
MODEL_DOWN = "The model does not answer now. These passages may answer the question:"
TEMPLATE = """Answer the question from the numbered passages alone. Cite each passage you use by its number, like [1]. \
If the passages do not answer it, say so.

{% for passage in passages %}[{{ passage.number }}] {{ passage.title }}
{{ passage.text }}

{% endfor %}Question: {{ question }}"""


def load_template(path: Path | None) -> str:
    """The prompt's Jinja template, which gets ``question`` and ``passages`` (number, title, source, text).

    Raises UserError for a file that is none, or that leaves one of the two out.
    """
    from jinja2 import Environment, TemplateError, meta

    if path is None:
        return TEMPLATE
    try:
        text = path.read_text(encoding="utf-8")
        names = meta.find_undeclared_variables(Environment().parse(text))
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise UserError(f"template: {path}: {error}") from None
    if lacking := {"question", "passages"} - names:
        raise UserError(f"template: {path} does not use {' and '.join(sorted(lacking))}")
    return text


def guess_tokens(text: str) -> int:
    """About how many tokens a text has, cautiously: one per three characters."""
    return len(text) // 3 + 1


def prompt(
    template: str, question: str, hits: Sequence[Hit], budget: int, count: Callable[[str], int] = guess_tokens
) -> str:
    """The prompt with the passages cut to ``budget`` tokens by ``count``."""
    from jinja2.sandbox import SandboxedEnvironment

    texts = trim([hit.text for hit in hits], budget, count)
    passages = [
        {"number": i, "title": hit.title, "source": hit.source, "text": text}
        for i, (hit, text) in enumerate(zip(hits, texts, strict=True), 1)
    ]
    return SandboxedEnvironment().from_string(template).render(question=question, passages=passages)


def cited(answer: str, sources: int) -> tuple[list[int], list[int]]:
    """(numbers of sources that the answer cites, numbers that it cites and that do not exist), each once, in order."""
    numbers = [n for match in CITATION.finditer(answer) for n in _numbers(match)]
    real = [n for n in dict.fromkeys(numbers) if 1 <= n <= sources]
    return real, [n for n in dict.fromkeys(numbers) if not 1 <= n <= sources]


def only_real(answer: str, sources: int) -> str:
    """The answer without citations of sources that do not exist; as it is where there are no sources."""

    def kept(match: re.Match[str]) -> str:
        numbers = dict.fromkeys(_numbers(match))
        real = [n for n in numbers if 1 <= n <= sources]
        return match[0] if len(real) == len(numbers) else "".join(f" [{n}]" for n in real)

    return CITATION.sub(kept, answer) if sources else answer


def _numbers(match: re.Match[str]) -> list[int]:
    return [int(number) for number in match["cited"].strip("[]").split(",")] if match["cited"] else []
