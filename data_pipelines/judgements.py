"""Judged search: queries, documents and relevance judgements in files of BEIR or TREC, and what they say of a ranking.

    corpus.jsonl   {"_id": "d1", "title": "...", "text": "..."}        BEIR
    queries.jsonl  {"_id": "q1", "text": "..."}, or lines q1<TAB>text  BEIR, TREC
    qrels          q1<TAB>d1<TAB>1 under a header, or q1 0 d1 1        BEIR, TREC

The measures are trec_eval's own, through pytrec_eval (van Gysel, de Rijke 2018).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError

DEPTH = 100
"""How far down a ranking is judged."""
MOST_GRADE = 1_000
"""Judges give 0 to 4, some -1 or -2; one that is far from it is a mistake in the file."""
GRADE = re.compile(r"-?[0-9]{1,20}")
MEASURES = {
    "ndcg_cut_10": "ndcg_at_10",
    "recall_10": "recall_at_10",
    "recall_100": "recall_at_100",
    "recip_rank": "mrr",
    "map_cut_100": "map_at_100",
}

Ranking = Mapping[str, float]
"""The score of each document that was found."""


def read_corpus(file: Path) -> dict[str, tuple[str, str]]:
    """(title, text) of each document. Raises UserError naming the line that is not one, or is there again."""
    return {name: (row["title"], row["text"]) for name, row in _objects(file, "corpus", title="", text="").items()}


def read_queries(file: Path) -> dict[str, str]:
    """The text of each query. Raises UserError naming the line that is not one."""
    if file.suffix in (".jsonl", ".json"):
        return {name: row["text"] for name, row in _objects(file, "queries", text=None).items()}
    queries: dict[str, str] = {}
    for number, line in _lines(file):
        name, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UserError(f"queries: {file}:{number}: expected an id, a tab and the query")
        if name in queries:
            raise UserError(f"queries: {file}:{number}: '{name}' is there twice")
        queries[name] = text.strip()
    return queries


def read_judgements(file: Path) -> dict[str, dict[str, int]]:
    """The grade of each judged document, by query. Raises UserError naming the line that is not a judgement."""
    judged: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        fields = line.split()
        if number == 1 and fields[-1:] == ["score"]:
            continue
        if len(fields) not in (3, 4) or not GRADE.fullmatch(fields[-1]):
            raise UserError(
                f"qrels: {file}:{number}: expected 'query document grade' or TREC's 'query 0 document grade'"
            )
        if abs(grade := int(fields[-1])) > MOST_GRADE:
            raise UserError(f"qrels: {file}:{number}: the grade {grade} is beyond {MOST_GRADE}")
        judged.setdefault(fields[0], {})[fields[-2]] = grade
    if not judged:
        raise UserError(f"qrels: {file} has no judgement")
    return judged


def evaluate(judged: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Ranking]) -> dict[str, float]:
    """The mean of each measure over the judged queries; one that found nothing counts as 0."""
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(grades) for query, grades in judged.items()},
        {"ndcg_cut.10", "recall.10,100", "recip_rank", "map_cut.100"},
    )
    scored = evaluator.evaluate({query: dict(ranking) for query, ranking in rankings.items() if query in judged})
    return {
        name: round(sum(each[measure] for each in scored.values()) / len(judged), 4)
        for measure, name in MEASURES.items()
    }


def best_of_documents(hits: list[dict[str, Any]]) -> dict[str, float]:
    """Chunks to documents: each document has the score of its best chunk."""
    ranking: dict[str, float] = {}
    for hit in hits:
        ranking[hit["document"]] = max(ranking.get(hit["document"], float("-inf")), hit["score"])
    return ranking


def _objects(file: Path, key: str, **texts: str | None) -> dict[str, dict[str, str]]:
    """The ``texts`` of each line's object by its ``_id``; what stands for one that is missing, None where it must be
    there."""
    found: dict[str, dict[str, str]] = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str | int):
            raise UserError(f"{key}: {file}:{number}: expected a JSON object with _id, a text or a number")
        name = str(row["_id"])
        if name in found:
            raise UserError(f"{key}: {file}:{number}: the _id '{name}' is there twice")
        found[name] = {}
        for field, usual in texts.items():
            value = usual if row.get(field) is None else row[field]
            if not isinstance(value, str):
                raise UserError(f"{key}: {file}:{number}: {field} is no text")
            found[name][field] = value
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
