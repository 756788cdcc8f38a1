"""Near duplicates by MinHash against brute force over all pairs."""

import random
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import duplicates
from data_pipelines.duplicates import BANDS, ShingleSets, jaccard, shares_bucket, survivors
from data_pipelines.words import EVERY, words_of

VOCABULARY = [f"word{i}" for i in range(400)]


def shingles(text: str) -> set[str]:
    return duplicates.shingles(words_of(text))


def band_keys(texts: list[str]) -> np.ndarray:
    return duplicates.band_keys([words_of(text) for text in texts])


def normal_hash(text: str) -> bytes:
    return duplicates.normal_hash(words_of(text))


def corpus(seed: int, families: int = 12) -> list[str]:
    """Texts in families: a random one and versions of it with some words changed, shuffled."""
    rng = random.Random(seed)
    texts = []
    for _ in range(families):
        words = rng.choices(VOCABULARY, k=rng.randrange(15, 60))
        for _ in range(rng.randrange(1, 6)):
            version = list(words)
            for _ in range(rng.randrange(0, 5)):
                version[rng.randrange(len(version))] = rng.choice(VOCABULARY)
            texts.append(" ".join(version))
    rng.shuffle(texts)
    return texts


def decide(texts: list[str], keys: np.ndarray, threshold: float) -> dict[str, str]:
    """Each near duplicate's survivor, as texts."""
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
    sets = ShingleSets()
    for some in (order[::2], order[1::2]):
        sets.add(np.array([order.index(i) for i in some]), [words_of(texts[i]) for i in some])
    sets.close(len(texts))
    found = survivors(keys[order], sets, threshold)
    for i, (survivor, similarity) in found.items():
        assert similarity == jaccard(shingles(texts[order[i]]), shingles(texts[order[survivor]]))
    return {texts[order[i]]: texts[order[survivor]] for i, (survivor, _) in found.items()}


def greedy(texts: list[str], threshold: float) -> dict[str, str]:
    """The same by comparing all pairs, the longest first."""
    kept: list[str] = []
    found = {}
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        best = max(kept, key=lambda other: jaccard(shingles(other), shingles(text)), default="")
        if best and jaccard(shingles(best), shingles(text)) >= threshold:
            found[text] = best
        else:
            kept.append(text)
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_buckets_find_what_brute_force_finds(seed: int) -> None:
    texts = sorted(set(corpus(seed)))
    everyone_together = np.zeros((len(texts), 1), dtype=np.uint64)
    assert decide(texts, band_keys(texts), 0.8) == decide(texts, everyone_together, 0.8) == greedy(texts, 0.8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_every_duplicate_is_like_its_survivor_and_survivors_are_not_alike(seed: int) -> None:
    texts = sorted(set(corpus(seed)))
    found = decide(texts, np.zeros((len(texts), 1), dtype=np.uint64), 0.7)
    kept = [text for text in texts if text not in found]
    assert all(jaccard(shingles(text), shingles(survivor)) >= 0.7 for text, survivor in found.items())
    assert all(jaccard(shingles(a), shingles(b)) < 0.7 for i, a in enumerate(kept) for b in kept[:i])
    assert set(found.values()) <= set(kept)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_outcome_does_not_depend_on_arrival(seed: int) -> None:
    texts = sorted(set(corpus(seed)))
    shuffled = random.Random(seed).sample(texts, len(texts))
    assert decide(texts, band_keys(texts), 0.8) == decide(shuffled, band_keys(shuffled), 0.8)


def test_jaccard() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    assert jaccard(set(), set()) == 0.0


def test_shingles_of_short_texts_are_the_text() -> None:
    assert shingles("One, two!") == {"one two"}
    assert shingles("...") == set()
    assert shingles("a b c d") == {"a b c", "b c d"}


def test_sets_of_hashes_are_the_sets_of_shingles() -> None:
    texts = ["a b c d a b c", "one two", "", "ONE, two!", "solo", "a b c"]
    sets = ShingleSets()
    sets.add(np.array([5, 1, 4]), [words_of(texts[i]) for i in (5, 1, 4)])
    sets.add(np.array([0, 3]), [words_of(texts[i]) for i in (0, 3)])
    sets.close(len(texts))
    found = [set(sets.of(i).tolist()) for i in range(len(texts))]
    assert [len(each) for each in found] == [len(shingles(text)) for text in texts]
    assert found[1] == found[3] and found[5] < found[0] and not found[1] & found[4]


def test_normal_hash_ignores_case_and_spacing_only() -> None:
    assert normal_hash("Read the  file.\n") == normal_hash("read the file")
    assert normal_hash("read the file") != normal_hash("read file the")


def test_only_texts_with_a_neighbour_share_a_bucket() -> None:
    keys = band_keys(["one two three four five", "one two three four five", "quite another text than that"])
    assert keys.shape == (3, BANDS)
    assert shares_bucket(keys).tolist() == [True, True, False]


def test_vowel_signs_and_accents_are_of_their_word() -> None:
    assert words_of("कि की") == ["कि", "की"] != words_of("का के")
    assert normal_hash("कि की कु के को") != normal_hash("का की कु के को")
    assert words_of("cafe\u0301s, 2\ufe0f\u20e3 i\u0307stanbul") == ["cafe\u0301s", "2", "i\u0307stanbul"]


def test_in_scripts_without_spaces_each_character_is_a_word() -> None:
    assert words_of("用Python3编程。") == ["用", "python3", "编", "程"]
    assert words_of("データ") == ["デ", "ー", "タ"]
    assert words_of("น้ำ 12") == ["น้", "ำ", "12"]
    assert words_of("한국어 문서, Ελληνικά и так далее") == ["한국어", "문서", "ελληνικά", "и", "так", "далее"]


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters(max_codepoint=0x2FF) | st.sampled_from("\u2013\u2019\u201c…€→αБ\u2003")))
def test_words_of_latin_are_runs_of_letters_and_digits(text: str) -> None:
    lower = text.lower()
    assert words_of(text) == EVERY.findall(lower)
    if "\u0307" not in lower:  # of a dotted capital I
        assert words_of(text) == re.findall(r"\w+", lower)
