"""Chunks cover the text, fit the model, and end where sentences do."""

import re

from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.chunks import chunk_spans, sentence_starts, storable


def tokens(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(r"\w+|[^\w\s]", text)]


def pieces(text: str, size: int, overlap: int) -> list[str]:
    return [text[start:end] for start, end in chunk_spans(text, tokens(text), size, overlap)]


def test_a_text_that_fits_is_one_chunk() -> None:
    assert pieces(" One. Two. ", 4, 1) == [" One. Two. "]


def test_chunks_end_with_sentences_and_overlap_by_whole_ones() -> None:
    text = "The first is here. A second follows it. The third ends. And one more."
    assert pieces(text, 10, 0) == ["The first is here. A second follows it.", "The third ends. And one more."]
    assert pieces(text, 10, 5) == [
        "The first is here. A second follows it.",
        "A second follows it. The third ends.",
        "The third ends. And one more.",
    ]


def test_a_sentence_longer_than_a_chunk_is_cut_between_words() -> None:
    text = " ".join(f"w{i}" for i in range(10))
    assert pieces(text, 4, 1) == ["w0 w1 w2 w3", "w3 w4 w5 w6", "w6 w7 w8 w9"]


def test_abbreviations_do_not_end_a_sentence() -> None:
    text = "See Fig. 3 for it. Then, e.g. Tables follow."
    assert [text[start:][:4] for start in sentence_starts(text)] == ["See ", "Then"]


@given(
    st.text(alphabet=st.sampled_from("ab. \nAB,-"), max_size=200),
    st.integers(1, 12),
    st.integers(0, 11),
)
def test_every_token_is_in_a_chunk_and_no_chunk_is_too_long(text: str, size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    spans = chunk_spans(text, tokens(text), size, overlap)
    inside = [sum(start <= first and last <= end for first, last in tokens(text)) for start, end in spans]
    assert all(count <= size for count in inside)
    covered = {span for span in tokens(text) for start, end in spans if start <= span[0] and span[1] <= end}
    assert covered == set(tokens(text))
    assert spans == sorted(set(spans))


def test_a_chunk_is_never_longer_than_a_field() -> None:
    text = "ä" * 100 + " END"
    spans = storable(text, [(0, 3), (0, len(text))], 64)
    assert spans[0] == (0, 3)
    assert "".join(text[start:end] for start, end in spans[1:]) == text
    assert max(len(text[start:end].encode()) for start, end in spans) <= 64
