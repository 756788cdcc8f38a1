"""What can be told of a text's quality without reading it: script, encoding damage, form, repetition, compression.

The rules, with their published limits, are those of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1) and C4
(Raffel et al. 2020, arXiv 1910.10683, section 2.2). They were made for English web pages: a text that breaks one is a
text to look at, and ``data filter`` removes only what it is told to.
"""

import functools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.ngrams import Words
from data_pipelines.repetition import REPEATED, TOP, repetition

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = frozenset("•‣▪◦●-*")
ELLIPSES = ("...", "…")
TERMINAL = frozenset('.!?"”')
SENTENCE_ENDS = (". ", ".\n", "! ", "!\n", "? ", "?\n")
BOILERPLATE = (
    "all rights reserved", "terms of use", "terms of service", "privacy policy", "cookie policy", "uses cookies",
    "use of cookies", "enable javascript", "javascript is disabled", "subscribe to our", "sign up for our",
    "click here to", "follow us on", "share on facebook", "powered by wordpress", "skip to content", "page not found",
    "under the apache license", "permission is hereby granted, free of charge", "without warranty of any kind",
)  # fmt: skip
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
AROUND = 8
NO_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isalpha() or byte > 127)
SAMPLED_LETTERS = 400
"""How many letters beyond ASCII are looked at to tell a text's script."""

SHARES = (
    "duplicate_lines", "duplicate_line_characters", "duplicate_paragraphs", "duplicate_paragraph_characters",
    "bullet_lines", "ellipsis_lines", "punctuated_lines",
)  # fmt: skip

GOPHER_QUALITY: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {
    "words": lambda q: (q["words"] < 50) | (q["words"] > 100_000),
    "word-length": lambda q: (q["word_length"] < 3) | (q["word_length"] > 10),
    "symbols": lambda q: q["symbols"] > 0.1,
    "bullets": lambda q: q["bullet_lines"] > 0.9,
    "ellipses": lambda q: q["ellipsis_lines"] > 0.3,
    "alphabetic": lambda q: q["alphabetic_words"] < 0.8,
    "stop-words": lambda q: q["stop_words"] < 2,
}
"""The rule's name and when a text breaks it."""

GOPHER_LINES = {
    "duplicate_lines": 0.30,
    "duplicate_paragraphs": 0.30,
    "duplicate_line_characters": 0.20,
    "duplicate_paragraph_characters": 0.20,
}
"""Limits of Gopher's table A1 that need no n-grams."""


def quality(
    texts: Sequence[str], words: Sequence[list[str]], table: Words, *, ngrams: bool
) -> dict[str, np.ndarray | list[str]]:
    """Columns of findings, one value a text, whose ``words`` are those of ``table``; with ``ngrams`` also
    ``repetition``'s.

    ``gopher_quality``, ``gopher_repetition`` and ``c4`` name the rules that a text breaks, separated by a space.
    """
    characters = np.array([len(text) for text in texts], dtype=np.float64)
    count = np.maximum(table.counts, 1)
    columns: dict[str, Any] = {
        "word_length": table.total(table.each(len)) / count,
        "alphabetic_words": table.total(table.each(_has_letter)) / count,
    }
    distinct = [set(own) for own in words]
    columns["distinct_words"] = np.array([len(own) for own in distinct]) / count
    columns["stop_words"] = np.array([len(STOP_WORDS & own) for own in distinct], dtype=np.float64)
    columns["symbols"] = np.array([_symbols(text) for text in texts]) / count
    columns["compression"] = np.array([compression(text) for text in texts])
    lines = np.array([line_shares(text) for text in texts], dtype=np.float64).reshape(-1, len(SHARES))
    columns |= {name: lines[:, place] for place, name in enumerate(SHARES)}
    columns = {name: values.astype(np.float32) for name, values in columns.items()}
    limits: dict[str, float] = dict(GOPHER_LINES)
    if ngrams:
        shares = repetition(table, characters)
        columns |= shares
        limits |= {f"top_{n}gram": limit for n, limit in TOP.items()}
        limits |= {f"repeated_{n}gram": limit for n, limit in REPEATED.items()}
    columns["mojibake"] = np.array([mojibake(text) for text in texts], dtype=np.int32)
    columns["script"] = [script(text) for text in texts]
    columns["boilerplate"] = np.array([boilerplate(text) for text in texts], dtype=np.int32)
    columns["gopher_repetition"] = _broken({name: columns[name] > limit for name, limit in limits.items()}, len(texts))
    measured = columns | {"words": table.counts}
    columns["gopher_quality"] = _broken({rule: breaks(measured) for rule, breaks in GOPHER_QUALITY.items()}, len(texts))
    columns["c4"] = [" ".join(c4(text)) for text in texts]
    return columns


def _broken(flags: dict[str, np.ndarray], texts: int) -> list[str]:
    """The names of the flags that are set, for each text."""
    names: list[list[str]] = [[] for _ in range(texts)]
    for name, flag in flags.items():
        for place in np.flatnonzero(flag):
            names[place].append(name)
    return [" ".join(own) for own in names]


def _has_letter(word: str) -> bool:
    return not word.isdigit() and any(c.isalpha() for c in word)


def _symbols(text: str) -> int:
    return text.count("#") + text.count("...") + text.count("…")


def compression(text: str) -> float:
    """Bytes of the text over bytes after zlib: high where it repeats itself, 0 where it is empty."""
    raw = text.encode("utf-8", "replace")
    return len(raw) / len(zlib.compress(raw, 1)) if raw else 0.0


def line_shares(text: str) -> tuple[float, ...]:
    """The values of ``SHARES``: empty lines do not count, and the first of equal lines is no duplicate."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return (0.0,) * len(SHARES)
    whole = len(text)
    again, characters = _repeated(lines)
    paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part] if "\n\n" in text else lines[:1]
    part_again, part_characters = _repeated(paragraphs) if len(paragraphs) > 1 else (0, 0)
    number = len(lines)
    return (
        again / number,
        characters / whole,
        part_again / len(paragraphs),
        part_characters / whole,
        sum([line[0] in BULLETS for line in lines]) / number,
        sum([line.endswith(ELLIPSES) for line in lines]) / number if "..." in text or "…" in text else 0.0,
        sum([line[-1] in TERMINAL for line in lines]) / number,
    )


def _repeated(parts: list[str]) -> tuple[int, int]:
    """(how many parts were there before, the characters of those)."""
    if len(set(parts)) == len(parts):
        return 0, 0
    times = Counter(parts)
    return len(parts) - len(times), sum((count - 1) * len(part) for part, count in times.items())


def mojibake(text: str) -> int:
    """How many signs there are that the text was decoded wrongly: ftfy's badness, and replacement characters."""
    if text.isascii():
        return 0
    from ftfy.badness import badness

    return int(badness(_beyond_ascii(text))) + text.count("\ufffd")


def _beyond_ascii(text: str) -> str:
    """The parts of ``text`` with characters beyond ASCII and what is around them: every sign of mojibake has one, and
    is shorter than ``AROUND``."""
    parts: list[str] = []
    start = end = 0
    for match in BEYOND_ASCII.finditer(text):
        if match.start() - AROUND > end:
            parts.append(text[start:end])
            start = match.start() - AROUND
        end = match.end() + AROUND
    parts.append(text[start:end])
    return "".join(parts)


def script(text: str) -> str:
    """The writing system of most of the letters, by the first word of their Unicode names: Latin, Cyrillic, CJK, ...;
    "none" where there are no letters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else "none"
    beyond = [c for run in BEYOND_ASCII.findall(text) for c in run if c.isalpha()]
    latin = len(text.encode("ascii", "ignore").translate(None, NO_LETTERS))
    sampled = Counter(_script_of(c) for c in beyond[:SAMPLED_LETTERS])
    scale = len(beyond) / max(1, sum(sampled.values()))
    counts = {name: number * scale for name, number in sampled.items()}
    counts["Latin"] = counts.get("Latin", 0) + latin
    best = max(counts, key=lambda name: (counts[name], name))
    return best if counts[best] else "none"


@functools.lru_cache(maxsize=20_000)
def _script_of(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]
    return first if first in ("CJK", "NKO") else first.capitalize()


def boilerplate(text: str) -> int:
    """How many of the ``BOILERPLATE`` phrases there are."""
    lower = text.lower()
    return sum(phrase in lower for phrase in BOILERPLATE)


def c4(text: str) -> list[str]:
    """The rules of C4 that a page breaks: few-sentences, lorem-ipsum, curly-bracket, javascript."""
    sentences = sum(map(text.count, SENTENCE_ENDS)) + text.endswith((".", "!", "?"))
    broken = [] if sentences >= 3 else ["few-sentences"]
    if "{" in text:
        broken.append("curly-bracket")
    lower = text.lower()
    if "lorem ipsum" in lower:
        broken.append("lorem-ipsum")
    if "javascript" in lower:
        broken.append("javascript")
    return broken
