"""The part of a text that has most of a query's words, these marked."""

import re

from data_pipelines.chunks import sentence_starts

WORD = re.compile(r"\w+")
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "a an and are as at be by can could did do does for from had has have how i if in into is it its may me must "
        "my of on or our shall should so some such than that the their them then there these they this those to was "
        "we were what when where which who whom whose why will with would you your"
    )
)
"""They say nothing of what a question is about, and yet some are rare among a few sentences."""
PASSAGE = 200


def asked_words(query: str) -> set[str]:
    """The words of ``query`` that say what it is about; all of them where there are no others."""
    words = {word.lower() for word in WORD.findall(query)}
    return words - FUNCTION_WORDS or words


def highlight(text: str, query: str, characters: int = PASSAGE, mark: str = "**") -> str:
    """About ``characters`` of ``text`` on one line, from the sentence after which most words of ``query`` come; each of
    these, or with another ending, between two ``mark``."""
    line = " ".join(text.split())
    stems = {_stem(word) for word in asked_words(query)}
    start = max(_starts(line), key=lambda at: len({_stem(w) for w in _words(line[at : at + characters])} & stems))
    passage = snippet(line[start:], characters)
    marked = WORD.sub(
        lambda found: f"{mark}{found[0]}{mark}" if _stem(found[0].lower()) in stems else found[0], passage
    )
    return f"…{marked}" if start else marked


def snippet(text: str, characters: int = PASSAGE) -> str:
    """The start of ``text`` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _starts(line: str) -> list[int]:
    return [at for at in sentence_starts(line) if at < len(line)] or [0]


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def _stem(word: str) -> str:
    """English plurals and verb endings off, roughly: enough to mark 'datasets' for 'dataset'."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word
