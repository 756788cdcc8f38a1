"""Judgements are read as BEIR and TREC write them, and measured as trec_eval does."""

import math
from pathlib import Path

import pytest

from data_pipelines.judgements import best_of_documents, evaluate, read_corpus, read_judgements, read_queries
from workbench.errors import UserError


def written(folder: Path, name: str, text: str) -> Path:
    """A file of this text."""
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n", "q1 0 d1 2\nq1 0 d2 0\n"])
def test_beir_and_trec_say_the_same(tmp_path: Path, text: str) -> None:
    assert read_judgements(written(tmp_path, "qrels.tsv", text)) == {"q1": {"d1": 2, "d2": 0}}


def test_queries_and_corpus(tmp_path: Path) -> None:
    lines = written(tmp_path, "queries.jsonl", '{"_id": "q1", "text": "why?"}\n\n{"_id": 2, "text": "how?"}\n')
    assert read_queries(lines) == {"q1": "why?", "2": "how?"}
    assert read_queries(written(tmp_path, "topics.tsv", "q1\twhy?\n")) == {"q1": "why?"}
    corpus = written(tmp_path, "corpus.jsonl", '{"_id": "d1", "title": "T", "text": "x"}\n{"_id": "d2", "text": "y"}\n')
    assert read_corpus(corpus) == {"d1": ("T", "x"), "d2": ("", "y")}


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (read_judgements, "q1 0 d1 1\nq1 d1\n", "qrels.*:2: expected"),
        (read_judgements, "\n", "has no judgement"),
        (read_judgements, "q1 0 d1 ²\n", ":1: expected"),
        (read_judgements, "q1 0 d1 --1\n", ":1: expected"),
        (read_judgements, "q1 0 d1 1000000000000\n", "grade 1000000000000 is beyond"),
        (read_queries, "q1 why\n", ":1: expected an id, a tab"),
        (read_queries, "q1\twhy\nq1\thow\n", ":2: 'q1' is there twice"),
        (read_corpus, "[]\n", ":1: expected a JSON object with _id"),
        (read_corpus, '{"_id": null, "text": "x"}', ":1: expected a JSON object with _id"),
        (read_corpus, '{"_id": "d1", "title": 7, "text": "x"}', ":1: title is no text"),
        (read_corpus, '{"_id": "d1", "text": ["x"]}', ":1: text is no text"),
        (read_corpus, '{"_id": "1"}\n{"_id": 1}', ":2: the _id '1' is there twice"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, read: object, text: str, said: str) -> None:
    assert callable(read)
    with pytest.raises(UserError, match=said):
        read(written(tmp_path, "file.tsv", text))


def test_a_query_without_text_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=":1: text is no text"):
        read_queries(written(tmp_path, "queries.jsonl", '{"_id": "q1", "text": null}'))


def test_a_byte_order_mark_is_not_part_of_an_id(tmp_path: Path) -> None:
    assert read_judgements(written(tmp_path, "qrels.tsv", "\ufeffq1 0 d1 -1\n")) == {"q1": {"d1": -1}}


def test_measures_of_a_ranking_worked_by_hand() -> None:
    judged = {"q1": {"d1": 1, "d2": 1}, "q2": {"d9": 1}}
    measured = evaluate(judged, {"q1": {"d3": 0.9, "d1": 0.8, "d4": 0.1}})
    gain = 1 / math.log2(3) / (1 + 1 / math.log2(3))  # one of two, at the second place
    assert measured["ndcg_at_10"] == pytest.approx(gain / 2, abs=1e-4)  # q2 found nothing and counts
    assert measured["recall_at_10"] == 0.25
    assert measured["mrr"] == 0.25


def test_a_document_is_as_good_as_its_best_chunk() -> None:
    hits = [{"document": "a", "score": 0.2}, {"document": "b", "score": 0.5}, {"document": "a", "score": 0.7}]
    assert best_of_documents(hits) == {"a": 0.7, "b": 0.5}
