"""Judged search: queries, documents and relevance judgements in files of BEIR or TREC, and what they say of a ranking.

    corpus.jsonl   {"_id": "d1", "title": "...", "text": "..."}        BEIR
    queries.jsonl  {"_id": "q1", "text": "..."}, or lines q1<TAB>text  BEIR, TREC
    qrels          q1<TAB>d1<TAB>1 under a header, or q1 0 d1 1        BEIR, TREC

The measures are trec_eval's own, through pytrec_eval (van Gysel, de Rijke 2018).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError

DEPTH = 100
"""How far down a ranking is judged."""
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
    """(title, text) of each document. Raises UserError naming the line that is not one."""
    return {str(row["_id"]): (row.get("title") or "", row.get("text") or "") for row in _objects(file, "corpus")}


def read_queries(file: Path) -> dict[str, str]:
    """The text of each query. Raises UserError naming the line that is not one."""
    if file.suffix in (".jsonl", ".json"):
        return {str(row["_id"]): str(row["text"]) for row in _objects(file, "queries", "text")}
    queries = {}
    for number, line in _lines(file):
        name, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UserError(f"queries: {file}:{number}: expected an id, a tab and the query")
        queries[name] = text.strip()
    return queries


def read_judgements(file: Path) -> dict[str, dict[str, int]]:
    """The grade of each judged document, by query. Raises UserError naming the line that is not a judgement."""
    judged: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        fields = line.split()
        if number == 1 and fields[-1:] == ["score"]:
            continue
        if len(fields) not in (3, 4) or not fields[-1].lstrip("-").isdigit():
            raise UserError(
                f"qrels: {file}:{number}: expected 'query document grade' or TREC's 'query 0 document grade'"
            )
        judged.setdefault(fields[0], {})[fields[-2]] = int(fields[-1])
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


def _objects(file: Path, key: str, *needed: str) -> Iterator[dict[str, Any]]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"_id", *needed} <= row.keys():
            raise UserError(f"{key}: {file}:{number}: expected a JSON object with {', '.join(('_id', *needed))}")
        yield row


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
