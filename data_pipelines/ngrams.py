"""The words of a batch of texts as numbers, and the n-grams of them, all texts at once.

A word is a 64-bit hash that is the same in every process; an n-gram's is rolled from those of its words.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Words:
    """The words of several texts, end to end: ``codes`` names each by its place in ``vocabulary``; text ``i`` has
    ``counts[i]`` of them from ``starts[i]`` on."""

    vocabulary: list[str]
    codes: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[list[str]]) -> "Words":
        """From texts that are given as their words."""
        flat = [word for words in texts for word in words]
        encoded = pa.array(flat, pa.string()).dictionary_encode()
        counts = np.array([len(words) for words in texts], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if len(counts) else counts
        return cls(encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False), starts, counts)

    @cached_property
    def owners(self) -> np.ndarray:
        """Which text each word is of."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def left(self) -> np.ndarray:
        """How many words of its text there are from each word on, itself included."""
        return np.repeat(self.starts + self.counts, self.counts) - np.arange(len(self.codes))

    @cached_property
    def vocabulary_hashes(self) -> np.ndarray:
        """uint64 of each word of the vocabulary."""
        digests = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in self.vocabulary)
        return np.frombuffer(digests, dtype=np.uint64)

    def each(self, measure: Callable[[str], float]) -> np.ndarray:
        """``measure`` of every word, computed once a word of the vocabulary."""
        values = np.array([measure(word) for word in self.vocabulary], dtype=np.float64)
        return values[self.codes] if len(values) else np.zeros(0)

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of ``values`` (one a word) over each text."""
        sums = np.concatenate([[0.0], np.cumsum(values)])
        return sums[self.starts + self.counts] - sums[self.starts]

    def rolling(self, most: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(n, hashes, positions) of the n-grams from 1 to ``most``, each n from the one before."""
        words = self.vocabulary_hashes[self.codes] if len(self.codes) else np.zeros(0, np.uint64)
        at = np.arange(len(self.codes))
        rolled = np.zeros(len(at), dtype=np.uint64)
        for n in range(1, most + 1):
            within = self.left[at] >= n
            at = at[within]
            rolled = (rolled[within] ^ words[at + (n - 1)]) * MULTIPLIER
            rolled ^= rolled >> np.uint64(29)
            yield n, rolled, at

    def hashes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hash of the n-gram, position of its first word) of every n-gram that lies within one text."""
        words = self.vocabulary_hashes[self.codes] if len(self.codes) else np.zeros(0, np.uint64)
        at = np.flatnonzero(self.left >= n)
        rolled = np.zeros(len(at), dtype=np.uint64)
        for offset in range(n):
            rolled = (rolled ^ words[at + offset]) * MULTIPLIER
            rolled ^= rolled >> np.uint64(29)
        return rolled, at
