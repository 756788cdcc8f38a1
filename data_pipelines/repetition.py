"""How much of a text repeats itself: the measures of Gopher's table A1 (Rae et al. 2021, arXiv 2112.11446).

The share of characters in the most frequent 2-, 3- and 4-gram, and in the second and later occurrences of 5- to
10-grams, characters in overlapping ones counted once.
"""

import numpy as np

from data_pipelines.ngrams import Words

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Limits of the most frequent n-gram's share of the characters."""
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Limits of the share of characters in repeated n-grams."""

LENGTH_BITS = np.uint64(10)
TEXT_BITS = np.uint64(20)
MOST_TEXTS = 1 << 20


def repetition(words: Words, characters: np.ndarray) -> dict[str, np.ndarray]:
    """``top_2gram`` to ``repeated_10gram`` of each text, shares of its ``characters`` (float32).

    At most a million texts at once.
    """
    assert len(words.counts) <= MOST_TEXTS, "split the batch"
    lengths = words.each(len) + 1
    reach = np.concatenate([[0.0], np.cumsum(lengths)])
    whole = np.maximum(characters, 1)
    shares: dict[str, np.ndarray] = {}
    for n, hashes, at in words.rolling(max(REPEATED)):
        if n not in TOP and n not in REPEATED:
            continue
        size = np.minimum(reach[at + n] - reach[at] - 1, 1023).astype(np.uint64)
        # Text first, so that one sort brings equal n-grams of a text together; equal n-grams are of equal length.
        owner = words.owners[at].astype(np.uint64)
        keys = (owner << (np.uint64(64) - TEXT_BITS)) | (hashes >> (TEXT_BITS + LENGTH_BITS) << LENGTH_BITS) | size
        if n in TOP:
            shares[f"top_{n}gram"] = _top(keys, len(whole)) / whole
        else:
            shares[f"repeated_{n}gram"] = words.total(lengths * _covered(keys, at, n, len(lengths))) / whole
    return {name: np.minimum(share, 1).astype(np.float32) for name, share in shares.items()}


def _top(keys: np.ndarray, texts: int) -> np.ndarray:
    """Characters of the most frequent n-gram of each text, 0 where none occurs twice; the longest of equals."""
    ordered = np.sort(keys)
    result = np.zeros(texts)
    if not len(ordered):
        return result
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    times = np.diff(np.append(edges, len(ordered))).astype(np.uint64)
    several = times > 1
    runs, times = ordered[edges][several], times[several]
    if not len(runs):
        return result
    owner = (runs >> (np.uint64(64) - TEXT_BITS)).astype(np.int64)
    size = runs & np.uint64(1023)
    first = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    best = np.maximum.reduceat((times << LENGTH_BITS) | size, first)
    result[owner[first]] = ((best >> LENGTH_BITS) * (best & np.uint64(1023))).astype(np.float64)
    return result


def _covered(keys: np.ndarray, at: np.ndarray, n: int, total: int) -> np.ndarray:
    """Which words lie in a second or later occurrence of an n-gram (bool, one a word)."""
    ordered = np.sort(keys)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(several):
        return np.zeros(total, dtype=bool)
    place = np.minimum(np.searchsorted(several, keys), len(several) - 1)
    repeated = np.flatnonzero(several[place] == keys)
    _, firsts = np.unique(keys[repeated], return_index=True)
    later = np.ones(len(repeated), dtype=bool)
    later[firsts] = False
    starts = at[repeated[later]]
    edges = np.bincount(starts, minlength=total + 1) - np.bincount(starts + n, minlength=total + 1)[: total + 1]
    return np.cumsum(edges)[:total] > 0
