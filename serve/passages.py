"""Fitting retrieved passages into a prompt, and cutting them into sentences to quote. Pure text, no model."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from data_pipelines.chunks import sentence_starts
from data_pipelines.highlight import asked_words
from data_pipelines.words import words_of

MORE = 1.5
"""How much more of the question a sentence of another hit must share than one of an equally good best hit."""


def trim(passages: Sequence[str], budget: int, count: Callable[[str], int]) -> list[str]:
    """Shorten the longest passages until all together have at most ``budget`` tokens by ``count``.

    Short passages stay whole; the others share what is left equally. Cuts fall between words. Passages for which
    nothing is left are empty.
    """
    lengths = [count(passage) for passage in passages]
    allowed = budget
    kept = list(passages)
    while sum(count(passage) for passage in kept if passage) > budget:
        shares = share(lengths, allowed)
        kept = [_cut(p, s / n if n else 1.0) for p, n, s in zip(passages, lengths, shares, strict=True)]
        allowed = int(allowed * 0.9) if allowed > 10 else allowed - 1
        if allowed < 0:
            return [""] * len(passages)
    return kept


def share(lengths: Sequence[int], budget: int) -> list[int]:
    """Divide ``budget`` over items that want ``lengths``: none gets more than it wants, the rest is equal."""
    shares = [0] * len(lengths)
    left, wanting = max(budget, 0), sorted(range(len(lengths)), key=lambda i: lengths[i])
    for position, index in enumerate(wanting):
        shares[index] = min(lengths[index], left // (len(wanting) - position))
        left -= shares[index]
    return shares


def _cut(text: str, fraction: float) -> str:
    if fraction >= 1:
        return text
    short = text[: int(len(text) * fraction)]
    return short.rsplit(None, 1)[0] if len(short.split()) > 1 else ""


def sentences(text: str) -> list[str]:
    """The sentences of ``text`` in order, white space normalised; common abbreviations do not end one."""
    starts = sentence_starts(text)
    found = (" ".join(text[start:end].split()) for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return [sentence for sentence in found if sentence]


def preference(scores: Sequence[float]) -> list[float]:
    """Weights of the sentences of hits with these similarities, best first: 1 for the best hit, at most 1 / MORE for
    the others, in proportion to their similarity."""
    best = max([*scores, 0.0])
    return [1.0 if i == 0 else max(score, 0.0) / best / MORE if best else 0.0 for i, score in enumerate(scores)]


def rank(question: str, candidates: Sequence[str], weights: Sequence[float] | None = None) -> list[int]:
    """Indices of ``candidates``, those that share the rarest words with the question first; ties keep their order.

    A word counts log(1 + N / n) where n of the N candidates have it (inverse document frequency); function words count
    only in a question that has no others. A candidate's score is divided by the root of its length, so that a long
    sentence does not win by length alone, and multiplied by its weight where there are ``weights``.
    """
    words = [set(words_of(c)) for c in candidates]
    frequency = Counter(word for one in words for word in one)
    asked = asked_words(question)
    scores = [
        sum(math.log1p(len(candidates) / frequency[w]) for w in asked & one) / math.sqrt(len(one) or 1) for one in words
    ]
    if weights is not None:
        scores = [score * weight for score, weight in zip(scores, weights, strict=True)]
    return sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
