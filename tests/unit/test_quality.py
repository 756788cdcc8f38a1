"""Quality findings of texts that were made to have them."""

import numpy as np
import pytest
from ftfy.badness import badness
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.ngrams import Words
from data_pipelines.quality import SHARES, boilerplate, c4, compression, line_shares, mojibake, quality, script
from data_pipelines.words import words_of

PROSE = (
    "The river that runs below the old town has been to the people of the valley what a road is to others. "
    "They have built their mills and their boats along it, and with every flood they lose some of them. "
    "Nobody would think of leaving, and that is what a visitor finds hard to see at first, for the water is cold."
)


def findings(text: str) -> dict[str, object]:
    words = [words_of(text)]
    return {name: values[0] for name, values in quality([text], words, Words.of(words), ngrams=True).items()}


def test_good_prose_breaks_no_rule() -> None:
    found = findings(PROSE)
    assert (found["gopher_quality"], found["gopher_repetition"], found["c4"]) == ("", "", "")
    assert (found["mojibake"], found["script"], found["boilerplate"]) == (0, "Latin", 0)


@pytest.mark.parametrize(
    ("text", "column", "rule"),
    [
        ("Too short.", "gopher_quality", "words"),
        ("1234 5678 " * 60, "gopher_quality", "alphabetic"),
        ("# word " * 60, "gopher_quality", "symbols"),
        ("\n".join(["- the point of a list is to be short and to have many of them"] * 9), "gopher_quality", "bullets"),
        ("\n".join(f"line {i} goes on and on..." for i in range(30)), "gopher_quality", "ellipses"),
        ("\n".join(["the same line again and again"] * 20), "gopher_repetition", "duplicate_lines"),
        ("buy it now " * 60, "gopher_repetition", "top_3gram"),
        ((PROSE + " ") * 3, "gopher_repetition", "repeated_10gram"),
        ("One. Two. Three. { x }", "c4", "curly-bracket"),
        ("Lorem ipsum dolor. Sit. Amet.", "c4", "lorem-ipsum"),
    ],
)
def test_broken_rules_are_named(text: str, column: str, rule: str) -> None:
    assert rule in str(findings(text)[column]).split()


def test_line_shares() -> None:
    shares = dict(zip(SHARES, line_shares("- a.\n- a.\n\nbcd...\n\nbcd..."), strict=True))
    assert shares["duplicate_lines"] == 0.5
    assert shares["duplicate_paragraphs"] == pytest.approx(1 / 3)
    assert shares["bullet_lines"] == 0.5
    assert shares["ellipsis_lines"] == 0.5
    assert shares["punctuated_lines"] == 1
    assert line_shares("") == (0,) * len(SHARES)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Утки", "Cyrillic"), ("πάπιες", "Greek"), ("鸭子在", "CJK"), ("بط", "Arabic"), ("1", "none")],
)  # fmt: skip
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


def test_mojibake() -> None:
    broken = "Der Müller geht über die Brücke. Schön".encode().decode("windows-1252")
    assert mojibake(broken) > 2
    assert mojibake("Der Müller geht über die Brücke. Schön") == 0
    assert mojibake("a � b") == 1


def test_compression_and_boilerplate() -> None:
    assert compression("ab" * 1000) > 20 > compression(PROSE) > 1
    assert compression("") == 0
    assert boilerplate("All rights reserved. See our Privacy Policy.") == 2
    assert c4("One. Two. Three.") == []


def test_a_batch_without_words() -> None:
    found = quality([""], [[]], Words.of([[]]), ngrams=True)
    assert np.isfinite(found["top_2gram"]).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*"aZ ÃÂÄà©€™ГВ°\xa0œ“”\n.", "plain words in between", "â€œ", "Ã©", "ГўВЂВ™s", "Â "]),
        max_size=30,
    )
)
def test_mojibake_is_what_ftfy_counts_in_the_whole_text(parts: list[str]) -> None:
    text = "".join(parts)
    assert mojibake(text) == badness(text)
