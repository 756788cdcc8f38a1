"""Near duplicates: MinHash finds candidates, the true Jaccard similarity of word shingles decides (each a 64-bit hash).

Signatures are rensa's MinHash (Broder 1997); bands of rows make locality-sensitive buckets (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, section 3.4). With 24 bands of 5 rows a pair of similarity 0.8 is missed once in
14,000 times. Documents are taken longest first, and each either joins the most similar survivor that it shares a
bucket with, or survives itself: every duplicate is similar to its own survivor, chains do not form, and the outcome
does not depend on the order in which documents arrive.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.ngrams import Words

BANDS = 24
ROWS = 5
SEED = 20
SHINGLE = 3


def normal_hash(words: list[str]) -> bytes:
    """16 bytes that are equal for texts with the same words in the same order, whatever their case and spacing."""
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def shingles(words: list[str]) -> set[str]:
    """The set of ``SHINGLE`` consecutive words; all words as one where there are fewer."""
    if len(words) < SHINGLE:
        return {" ".join(words)} if words else set()
    return set(map(" ".join, zip(*(words[i:] for i in range(SHINGLE)), strict=False)))


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared over all members; 0 where both are empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def band_keys(texts: Sequence[list[str]]) -> np.ndarray:
    """LSH bucket of each text, given as its words, in each band: uint64 [len(texts), BANDS]."""
    from rensa import RMinHash

    sets = [list(shingles(words)) for words in texts]
    matrix = RMinHash.digest_matrix_from_token_sets(sets, BANDS * ROWS, SEED)
    signatures = np.asarray(matrix.to_rows(), dtype=np.uint64).reshape(len(sets), BANDS, ROWS)
    keys = np.full((len(sets), BANDS), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for row in range(ROWS):  # FNV-like mixing of the rows; a collision only costs one comparison
        keys = (keys ^ signatures[:, :, row]) * np.uint64(0x100000001B3)
        keys ^= keys >> np.uint64(29)
    return keys


def shares_bucket(keys: np.ndarray) -> np.ndarray:
    """Which rows of ``keys`` [documents, bands] share a bucket with another row: bool [documents]."""
    shared = np.zeros(len(keys), dtype=bool)
    for band in range(keys.shape[1]):
        _, inverse, count = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared |= count[inverse] > 1
    return shared


def shared_buckets(keys: np.ndarray) -> np.ndarray:
    """A number for each bucket that holds several of the documents, -1 for one that holds a single one: int32
    [documents, bands]."""
    numbers = np.full(keys.shape, -1, dtype=np.int32)
    base = 0
    for band in range(keys.shape[1]):
        _, inverse, count = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        several = count[inverse] > 1
        numbers[several, band] = inverse[several] + base
        base += len(count)
    return numbers


@dataclass
class ShingleSets:
    """The shingles of documents as sorted 64-bit hashes, 8 bytes each: gather with ``add``, then ``close``."""

    _parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, documents: np.ndarray, texts: Sequence[list[str]]) -> None:
        """Take some documents, given by number and as their words; each once, in any order."""
        words = Words.of(texts)
        hashes, at = words.hashes(SHINGLE)
        owners = documents[words.owners[at]]
        short = [(number, own) for number, own in zip(documents.tolist(), texts, strict=True) if 0 < len(own) < SHINGLE]
        if short:
            whole = b"".join(normal_hash(own)[:8] for _, own in short)
            hashes = np.concatenate([hashes, np.frombuffer(whole, dtype=np.uint64)])
            owners = np.concatenate([owners, np.array([number for number, _ in short])])
        order = np.lexsort((hashes, owners))
        hashes, owners = hashes[order], owners[order]
        first = np.ones(len(hashes), dtype=bool)
        first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        hashes, owners = hashes[first], owners[first]
        begins = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]])) if len(owners) else owners
        self._parts.append((owners[begins], np.diff(np.append(begins, len(owners))), hashes))

    def close(self, number: int) -> None:
        """Put the sets of documents 0 to ``number`` in order; one that was not added is empty."""
        sizes = np.zeros(number, dtype=np.int64)
        for documents, counts, _ in self._parts:
            sizes[documents] = counts
        self.edges = np.concatenate([[0], np.cumsum(sizes)])
        self.flat = np.empty(self.edges[-1], dtype=np.uint64)
        while self._parts:  # each part is gone when it is copied
            documents, counts, hashes = self._parts.pop()
            shift = self.edges[documents] - (np.cumsum(counts) - counts)
            self.flat[np.repeat(shift, counts) + np.arange(len(hashes))] = hashes

    def of(self, document: int) -> np.ndarray:
        """The sorted hashes of one."""
        return self.flat[self.edges[document] : self.edges[document + 1]]


def survivors(keys: np.ndarray, sets: ShingleSets, threshold: float) -> dict[int, tuple[int, float]]:
    """Map each near duplicate to (its survivor, their Jaccard similarity >= ``threshold``).

    Documents are numbered in the order of preference, the preferred survivors first; ``keys`` is [documents, bands] of
    ``band_keys``.
    """
    sizes = np.diff(sets.edges)
    members: dict[int, list[int]] = defaultdict(list)
    duplicate_of: dict[int, tuple[int, float]] = {}
    for document, row in enumerate(shared_buckets(keys)):
        buckets = row[row >= 0].tolist()
        candidates = {other for bucket in buckets for other in members.get(bucket, ())}
        if candidates:
            others = np.fromiter(candidates, dtype=np.int64, count=len(candidates))
            own = int(sizes[document])
            # The similarity cannot be higher than the ratio of the sizes.
            close = np.minimum(sizes[others], own) >= threshold * np.maximum(np.maximum(sizes[others], own), 1)
            others = others[close]
            if len(others) and own:
                similarity = _similarities(sets.of(document), [sets.of(other) for other in others.tolist()])
                best = float(similarity.max())
                if best >= threshold:
                    duplicate_of[document] = (int(others[similarity == best].min()), best)
                    continue
        for bucket in buckets:
            members[bucket].append(document)
    return duplicate_of


def _similarities(own: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Jaccard similarity of one set with each of several, none of them empty."""
    sizes = np.array([len(other) for other in others])
    joined = np.concatenate(others)
    place = np.searchsorted(own, joined)
    place[place == len(own)] = 0
    shared = np.add.reduceat(own[place] == joined, np.concatenate([[0], np.cumsum(sizes)[:-1]]), dtype=np.int64)
    similarities: np.ndarray = shared / (sizes + len(own) - shared)
    return similarities
