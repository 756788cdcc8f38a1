"""Passages for a question: one search or several wordings of it, fused, and whether they answer it at all."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipelines.search import Hit, Mode, Searcher

RANK_OFFSET = 60
"""Of reciprocal rank fusion (Cormack, Clarke, Buettcher 2009)."""
WORDINGS = (
    "Write {count} other ways to ask the question below, each on a line of its own, without numbers or comments.\n\n"
    "Question: {question}"
)


@dataclass(frozen=True)
class Found:
    """Passages, best first; whether the documents are too ``weak`` to answer: none was found, or none is by meaning as
    near as the threshold. ``nearest`` is the best inner product of unit vectors, where it was asked for."""

    hits: list[Hit]
    weak: bool
    nearest: float | None


class Documents:
    """A collection that is asked again and again. Its model is loaded once; a Milvus Lite folder is let go after each
    question, so that ``data embed`` can go on writing it."""

    def __init__(self, uri: str, collection: str, model: str = "") -> None:
        self._place = (uri, collection, model)
        self._encoder: Any = None

    def find(self, wordings: Sequence[str], limit: int, mode: Mode, threshold: float) -> Found:
        """The ``limit`` best passages for all wordings together, best first. Raises UserError as ``Searcher`` does.

        Scores of BM25 and of fused ranks have no scale, so in those modes the nearest passage is asked for beside them,
        where there is a ``threshold`` to hold it against.
        """
        with Searcher(*self._place, self._encoder) as searcher:
            found = [searcher.search(wording, limit, mode=mode) for wording in wordings]
            by_meaning = found
            if mode != "dense":
                by_meaning = [searcher.search(wording, 1) for wording in wordings] if threshold > 0 else []
            if mode != "keywords" or by_meaning:
                self._encoder = searcher.encoder
        nearest = max((hit.score for hits in by_meaning for hit in hits), default=None)
        hits = found[0] if len(found) == 1 else fuse(found, limit)
        return Found(hits, not hits or (nearest is not None and nearest < threshold), nearest)


def fuse(rankings: Sequence[Sequence[Hit]], limit: int) -> list[Hit]:
    """One ranking from several by the sum of 1 / (60 + rank); a hit keeps the best score that it had."""
    points: dict[str, float] = {}
    best: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            points[hit.id] = points.get(hit.id, 0.0) + 1 / (RANK_OFFSET + rank)
            if hit.id not in best or hit.score > best[hit.id].score:
                best[hit.id] = hit
    return [best[name] for name in sorted(points, key=lambda name: -points[name])][:limit]


def wordings(question: str, count: int, write: Callable[[str], str]) -> list[str]:
    """The question and up to ``count - 1`` other wordings that ``write`` (a model) gives for a prompt."""
    if count < 2:
        return [question]
    return [question, *parse_wordings(write(WORDINGS.format(count=count - 1, question=question)), question, count - 1)]


def parse_wordings(text: str, question: str, count: int) -> list[str]:
    """The lines of a model's list, without numbers, bullets and repetitions."""
    lines = (re.sub(r"^\s*(?:[-*]|\d+[.)])\s*", "", line).strip() for line in text.splitlines())
    return [line for line in dict.fromkeys(lines) if line and line != question][:count]


def source_rows(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The numbered sources as an answer carries them."""
    keep = ("id", "document", "title", "source", "text", "score")
    return [{"number": i, **{k: v for k, v in asdict(hit).items() if k in keep}} for i, hit in enumerate(hits, 1)]
