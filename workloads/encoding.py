"""A conversation becomes token ids of which some are learned: the answers, unless told otherwise.

The whole conversation is rendered and tokenized at once, as a model meets it, and a token is learned where any of its
characters is. Where a token would hold the end of a prompt and the beginning of its answer (a prompt that ends with a
blank), the text is cut there first, as the model is asked with the prompt alone.

Over ``max_length`` tokens a row loses its beginning, and an answer that is longer alone loses its end: half a question
with its answer teaches more than a question without one. What stands behind the last learned token is left out, as
nothing is learned from it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from workbench.errors import UserError
from workloads.chat_templates import answers_in
from workloads.conversations import Conversation
from workloads.training.batches import IGNORE, Row

TrainOn = Literal["answers", "last_answer", "all"]


@dataclass(frozen=True)
class Recipe:
    """How conversations become rows. The config's keys of the same names."""

    base: str
    chat_template: str = ""
    max_length: int = 512
    train_on: TrainOn = "answers"
    pairs: bool = False
    """Rows are the chosen and the rejected answers of preferences in turn (``preferences.py``)."""


@dataclass(frozen=True)
class Counts:
    """What became of some conversations; all in tokens but the rows.

    ``rows_dropped`` have no answer to learn, ``rows_cut`` lost ``tokens_lost``, of these ``answers_cut`` the end of
    their answer. ``longest`` is before any cut, ``shortest_answer`` of the last ones with what must be kept behind
    them, 0 where there is none. Of preferences a row is a pair, and those ``alike`` have the same answer twice.
    """

    rows: int = 0
    rows_dropped: int = 0
    alike: int = 0
    rows_cut: int = 0
    answers_cut: int = 0
    tokens: int = 0
    targets: int = 0
    tokens_lost: int = 0
    longest: int = 0
    shortest_answer: int = 0
    largest_id: int = -1

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = asdict(self), asdict(other)
        total = {name: mine[name] + theirs[name] for name in mine}
        total |= {name: max(mine[name], theirs[name]) for name in ("longest", "largest_id")}
        shortest = [each for each in (self.shortest_answer, other.shortest_answer) if each]
        return Counts(**{**total, "shortest_answer": min(shortest, default=0)})


Encoded = list[tuple[int, Row, Counts]]
"""Rows with the places of their conversations among those given, and what became of each."""


def encode(rows: Sequence[Conversation], tokenizer: Any, recipe: Recipe) -> tuple[list[Row], Counts]:
    """The rows of those conversations that have an answer to learn, in their order, and what became of them all.

    Raises UserError, with the row's source, where the chat template does not take a conversation.
    """
    encoded = encode_each(rows, tokenizer, recipe)
    return [row for _, row, _ in encoded], total(encoded, len(rows))


def total(encoded: Encoded, given: int) -> Counts:
    """What became of the ``given`` conversations that ``encoded`` was made of."""
    return sum((counts for *_, counts in encoded), Counts(rows_dropped=given - len(encoded)))


def encode_each(rows: Sequence[Conversation], tokenizer: Any, recipe: Recipe) -> Encoded:
    """As ``encode``, row by row."""
    encoded: Encoded = []
    places = [n for n, row in enumerate(rows) if recipe.train_on == "all" or _answered(row, recipe.train_on)]
    wanted = [rows[number] for number in places]
    rendered = [_answers(row, tokenizer, recipe.train_on == "last_answer") for row in wanted]
    texts = [text for text, _ in rendered]
    tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if texts else {}
    for place, (row, (_, spans)) in enumerate(zip(wanted, rendered, strict=True)):
        ids, edges_T2 = tokens["input_ids"][place], _edges(tokens["offset_mapping"][place])
        starts = [start for start, _ in spans]
        if any(((edges_T2[:, 0] < start) & (edges_T2[:, 1] > start)).any() for start in starts):
            ids, edges_T2 = _in_pieces(texts[place], starts, tokenizer)
        inside_T = [(edges_T2[:, 0] < end) & (edges_T2[:, 1] > start) for start, end in spans]
        if not spans or not inside_T[-1].any():
            continue
        learned_T = np.logical_or.reduce(inside_T) if recipe.train_on != "all" else np.ones(len(ids), bool)
        last = np.flatnonzero(inside_T[-1])
        first, end = int(last[0]), len(ids) if recipe.train_on == "all" else int(last[-1]) + 1
        kept = _kept(first, end, recipe.max_length)
        if not learned_T[kept][1:].any():
            continue
        labels = np.where(learned_T, ids, IGNORE)[kept].tolist()
        made = Row(ids[kept], labels, (row.source,))
        counts = Counts(
            rows=1,
            rows_cut=len(made.ids) < end,
            answers_cut=kept.stop < end,
            tokens=len(made.ids),
            targets=made.targets,
            tokens_lost=end - len(made.ids),
            longest=end,
            shortest_answer=end - first,
            largest_id=max(made.ids),
        )
        encoded.append((places[place], made, counts))
    return encoded


def _edges(offsets: Any) -> np.ndarray:
    return np.asarray(offsets).reshape(-1, 2)


def _in_pieces(text: str, starts: Sequence[int], tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """Token ids of ``text`` and the characters ``[begin, end)`` of each, where no token reaches over a start."""
    ids: list[int] = []
    edges = []
    for begin, end in itertools.pairwise([0, *starts, len(text)]):
        piece = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += piece["input_ids"]
        edges.append(_edges(piece["offset_mapping"]) + begin)
    return ids, np.concatenate(edges)


def _answered(row: Conversation, train_on: TrainOn) -> bool:
    answers = [message.content for message in row.messages if message.role == "assistant"]
    return any(answer.strip() for answer in (answers[-1:] if train_on == "last_answer" else answers))


def _answers(row: Conversation, tokenizer: Any, last_alone: bool) -> tuple[str, list[tuple[int, int]]]:
    try:
        return answers_in(row.turns, tokenizer, last_alone)
    except UserError as error:
        raise UserError(f"{row.source}: {error}") from None


def _kept(first: int, end: int, most: int) -> slice:
    """Which of ``end`` tokens stay, where the last answer begins at ``first``."""
    if end - first >= most:
        start = max(0, first - 1)
        return slice(start, min(end, start + most))
    return slice(max(0, end - most), end)
