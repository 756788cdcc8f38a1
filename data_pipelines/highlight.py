"""The part of a text that has most of a query's words, these marked."""

from data_pipelines.chunks import sentence_starts
from data_pipelines.words import word_places, words_of

FUNCTION_WORDS = frozenset(
    words_of(
        "a an and are as at be by can could did do does for from had has have how i if in into is it its may me must "
        "my of on or our shall should so some such than that the their them then there these they this those to was "
        "we were what when where which who whom whose why will with would you your"
    )
)
"""They say nothing of what a question is about, and yet some are rare among a few sentences."""
PASSAGE = 200


def asked_words(query: str) -> set[str]:
    """The words of ``query`` that say what it is about; all of them where there are no others."""
    words = set(words_of(query))
    return words - FUNCTION_WORDS or words


def highlight(text: str, query: str, characters: int = PASSAGE, mark: str = "**") -> str:
    """About ``characters`` of ``text`` on one line, from the sentence after which most words of ``query`` come; each of
    these, or with another ending, between two ``mark``."""
    line = " ".join(text.split())
    stems = {_stem(word) for word in asked_words(query)}
    start = max(_starts(line), key=lambda at: len({_stem(w) for w in words_of(line[at : at + characters])} & stems))
    passage = snippet(line[start:], characters)
    marked = passage
    for first, end in reversed(_joined([w.span() for w in word_places(passage) if _stem(w[0].lower()) in stems])):
        marked = f"{marked[:first]}{mark}{marked[first:end]}{mark}{marked[end:]}"
    return f"…{marked}" if start else marked


def snippet(text: str, characters: int = PASSAGE) -> str:
    """The start of ``text`` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _starts(line: str) -> list[int]:
    return [at for at in sentence_starts(line) if at < len(line)] or [0]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that follow each other without a gap as one, as characters of one Chinese word do."""
    joined: list[tuple[int, int]] = []
    for first, end in spans:
        joined.append((joined.pop()[0], end) if joined and joined[-1][1] == first else (first, end))
    return joined


def _stem(word: str) -> str:
    """English plurals and verb endings off, roughly: enough to mark 'datasets' for 'dataset'."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word
