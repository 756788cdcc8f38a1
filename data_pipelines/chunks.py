"""Long texts as overlapping chunks that a model can take whole, cut where sentences end. Pure text, no model.

for start, end in chunk_spans(text, token_offsets, size=254, overlap=32):
    text[start:end]
"""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[A-Z0-9\"'(`\[])"  # a full stop, perhaps inside quotes or brackets
    r"|\n\s*\n|\n(?=\s*[-*•]\s)"  # a paragraph, an item of a list
)
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Fig|Eq|Dr|Mr|Ms|No|al)\.|\b[A-Z]\.)$")
LONGEST_ABBREVIATION = 8


def sentence_starts(text: str) -> list[int]:
    """Where the sentences of ``text`` begin, the first at 0; common abbreviations do not end one."""
    ends = SENTENCE_END.finditer(text)
    return [0] + [
        end.end()
        for end in ends
        if not ABBREVIATION.search(text[max(0, end.start() - LONGEST_ABBREVIATION) : end.start()])
    ]


def chunk_spans(text: str, offsets: Sequence[tuple[int, int]], size: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of each chunk in characters of ``text``.

    ``offsets`` are the (start, end) of the text's tokens. A chunk has at most ``size`` tokens and ends with a sentence,
    or between words where one sentence alone is longer. The next begins with the first sentence that starts in its last
    ``overlap`` tokens. Together they cover every token.
    """
    if len(offsets) <= size:
        return [(0, len(text))]
    begins = [start for start, _ in offsets]
    sentences = sorted({bisect_left(begins, start) for start in sentence_starts(text)})
    words = [place for place, start in enumerate(begins) if place and start > offsets[place - 1][1]]
    spans: list[tuple[int, int]] = []
    begin = 0
    while begin + size < len(offsets):
        end = _last(sentences, begin, begin + size) or _last(words, begin, begin + size) or begin + size
        spans.append((begin, end))
        begin = _first(sentences, end - overlap, begin, end) or _first(words, end - overlap, begin, end) or end
    spans.append((begin, len(offsets)))
    return [(offsets[first][0], offsets[last - 1][1]) for first, last in spans]


def storable(text: str, spans: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """``spans`` with those of more than ``most`` bytes of UTF-8 divided: few tokens can be many characters."""
    step = most // 4  # bytes of a character at most
    divided: list[tuple[int, int]] = []
    for start, end in spans:
        whole = end - start <= step or len(text[start:end].encode()) <= most
        edges = [start, end] if whole else [*range(start, end, step), end]
        divided += itertools.pairwise(edges)
    return divided


def _last(places: Sequence[int], above: int, most: int) -> int | None:
    """The last of the sorted ``places`` in (above, most], or None."""
    at = bisect_right(places, most) - 1
    return places[at] if at >= 0 and places[at] > above else None


def _first(places: Sequence[int], least: int, above: int, most: int) -> int | None:
    """The first of the sorted ``places`` in [least, most] that is above ``above``, or None."""
    at = bisect_left(places, max(least, above + 1))
    return places[at] if at < len(places) and places[at] <= most else None
