"""Evaluation texts that are in the training texts: whole, nearly, or by a run of words.

A run of 13 words is the measure of Brown et al. 2020 (arXiv 2005.14165, appendix C). An evaluation text that is shorter
has no such run and is compared whole only.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from data_pipelines.duplicates import jaccard, shingles
from data_pipelines.index import Index
from data_pipelines.words import word_places, words_of

MOST_RUNS = 64
MOST_TEXTS = 8
"""Of each evaluation text so many runs, and of each run so many training texts, are compared to show the best match."""
MOST_CANDIDATES = 50
"""Of each evaluation text so many training texts are compared with it for a near duplicate, the likeliest ones."""
CONTEXT = 60


@dataclass(frozen=True)
class Leak:
    """One evaluation document that is in the training documents, and the one that has most of it.

    ``kind`` is exact, near or ngram; ``similarity`` is that of their word sets, for ngram the share of the evaluation
    document's runs that are in training documents at all.
    """

    evaluation: int
    training: int
    kind: str
    similarity: float


@dataclass(frozen=True)
class Runs:
    """n-gram hashes and the documents they are of, as two arrays of one length, sorted by hash."""

    hashes: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[tuple[int, bytes]]) -> "Runs":
        """From (document, its hashes as bytes)."""
        hashes, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for document, content in parts:
            own = np.frombuffer(content, dtype=np.uint64)
            hashes.append(own)
            documents.append(np.full(len(own), document))
        joined, whose = np.concatenate(hashes), np.concatenate(documents)
        order = np.lexsort((whose, joined))
        return cls(joined[order], whose[order])


def find_leaks(
    index: Index,
    evaluation: np.ndarray,
    training: np.ndarray,
    runs: tuple[Runs, Runs],
    texts_of: Callable[[np.ndarray], dict[int, str]],
    threshold: float,
) -> tuple[list[Leak], dict[int, tuple[int, str]]]:
    """(one Leak for each evaluation document that leaks, by its index; for each training document that holds one
    (that evaluation document, kind)).

    ``runs`` are those of the evaluation documents and, of the training documents, the ones shared with those.
    """
    leaks: dict[int, Leak] = {}
    holds: dict[int, tuple[int, str]] = {}

    def note(leak: Leak) -> None:
        leaks.setdefault(leak.evaluation, leak)
        holds.setdefault(leak.training, (leak.evaluation, leak.kind))

    for own, other in _equal(index, evaluation, training):
        note(Leak(own, other, "exact", 1.0))
    candidates = [pair for pair in _same_bucket(index, evaluation, training) if pair[0] not in leaks]
    texts = texts_of(np.unique(np.array(candidates, dtype=np.int64)))
    best = sorted((-_similarity(texts, pair), pair) for pair in candidates)
    for similarity, (own, other) in best:
        if -similarity >= threshold:
            note(Leak(own, other, "near", round(-similarity, 4)))
    mine, theirs = runs
    shared = np.isin(mine.hashes, theirs.hashes)
    whole, found = Counter(mine.documents.tolist()), Counter(mine.documents[shared].tolist())
    for own, others in _by_runs(mine, theirs, shared).items():
        note(Leak(own, others, "ngram", round(found[own] / whole[own], 4)))
    for other, own in zip(theirs.documents.tolist(), _first_owner(mine, theirs), strict=True):
        holds.setdefault(other, (own, "ngram"))
    return sorted(leaks.values(), key=lambda leak: leak.evaluation), holds


def _equal(index: Index, evaluation: np.ndarray, training: np.ndarray) -> list[tuple[int, int]]:
    """Pairs with the same words in the same order, the smallest training id first."""
    wanted: dict[bytes, list[int]] = {}
    for own in evaluation.tolist():
        wanted.setdefault(index.hashes[own].tobytes(), []).append(own)
    return [(own, other) for other in training.tolist() for own in wanted.get(index.hashes[other].tobytes(), ())]


def _same_bucket(index: Index, evaluation: np.ndarray, training: np.ndarray) -> list[tuple[int, int]]:
    """Candidate pairs: for each evaluation document the ``MOST_CANDIDATES`` that share most buckets with it."""
    shared: dict[int, list[np.ndarray]] = {}
    for band in range(index.bands.shape[1]):
        own, keys = index.bands[evaluation, band], index.bands[training, band]
        hits = np.isin(keys, own)
        order = np.argsort(keys[hits], kind="stable")
        keys, others = keys[hits][order], training[hits][order]
        firsts, ends = np.searchsorted(keys, own, side="left"), np.searchsorted(keys, own, side="right")
        for place in np.flatnonzero(ends > firsts).tolist():
            shared.setdefault(int(evaluation[place]), []).append(others[firsts[place] : ends[place]])
    pairs = []
    for document, found in shared.items():
        others, buckets = np.unique(np.concatenate(found), return_counts=True)
        best = np.argsort(-buckets, kind="stable")[:MOST_CANDIDATES]
        pairs += [(document, other) for other in others[best].tolist()]
    return pairs


def _similarity(texts: dict[int, str], pair: tuple[int, int]) -> float:
    own, other = (shingles(words_of(texts[place])) for place in pair)
    return jaccard(own, other)


def _by_runs(mine: Runs, theirs: Runs, shared: np.ndarray) -> dict[int, int]:
    """For each evaluation document that shares a run: the training document that shares most of those looked at."""
    counts: dict[int, Counter[int]] = {}
    looked: Counter[int] = Counter()
    hashes, owners = mine.hashes[shared], mine.documents[shared]
    firsts = np.searchsorted(theirs.hashes, hashes, side="left")
    ends = np.searchsorted(theirs.hashes, hashes, side="right")
    for own, first, end in zip(owners.tolist(), firsts.tolist(), ends.tolist(), strict=True):
        if looked[own] < MOST_RUNS:
            looked[own] += 1
            counts.setdefault(own, Counter()).update(theirs.documents[first : min(end, first + MOST_TEXTS)].tolist())
    return {own: max(seen, key=lambda other: (seen[other], -other)) for own, seen in counts.items()}


def _first_owner(mine: Runs, theirs: Runs) -> list[int]:
    """For each run of a training document, an evaluation document that has it."""
    if not len(mine.hashes):
        return []
    return [int(own) for own in mine.documents[np.searchsorted(mine.hashes, theirs.hashes)]]


@dataclass(frozen=True)
class Span:
    """The longest run of words that two texts share: how many, and where it stands in each, with what is around it."""

    words: int
    evaluation: tuple[str, str, str]
    training: tuple[str, str, str]


def longest_shared(evaluation: str, training: str) -> Span:
    """The longest run of words in both texts; (before, run, after) of each."""
    ours, theirs = list(word_places(evaluation)), list(word_places(training))
    own, other = [m.group().lower() for m in ours], [m.group().lower() for m in theirs]
    places: dict[str, list[int]] = {}
    for place, word in enumerate(other):
        places.setdefault(word, []).append(place)
    length, at, there = 0, 0, 0
    ending: dict[int, int] = {}  # the length of the shared run that ends at each word of the other text
    for place, word in enumerate(own):
        now = {theirs_at: ending.get(theirs_at - 1, 0) + 1 for theirs_at in places.get(word, ())}
        for theirs_at, run in now.items():
            if run > length:
                length, at, there = run, place - run + 1, theirs_at - run + 1
        ending = now
    if not length:
        return Span(0, ("", "", ""), ("", "", ""))
    return Span(length, _around(evaluation, ours, at, length), _around(training, theirs, there, length))


def _around(text: str, words: list[re.Match[str]], at: int, length: int) -> tuple[str, str, str]:
    start, end = words[at].start(), words[at + length - 1].end()
    return text[max(0, start - CONTEXT) : start], text[start:end], text[end : end + CONTEXT]
