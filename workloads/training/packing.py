"""Several examples in one sequence, none of which sees another: no attention across them, positions that restart.

    packed = PackedRows(rows, capacity=2048, seed=0)
    batches = Batches(packed, batch_size=16, seed=0)  # 16 sequences, each of up to 2048 tokens of one or more examples

Rows are drawn in a random order and, a window at a time, put by best-fit decreasing: the longest first, each into the
fullest sequence that still has room (Johnson 1973, "Near-optimal bin packing algorithms"). Which rows share a sequence
depends on the seed alone and stays for all epochs, so that any step's batch is known without the steps before it.
"""

import bisect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from workbench.errors import UserError
from workloads.training.batches import IGNORE, MadeRows, Row, collate, lengths_of
from workloads.training.fsdp import evaluation_mode

WINDOW = 4096
"""Rows that are packed together: enough that short ones are found for every gap."""


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Indices of the rows of each sequence; every row is in one, and none holds more than ``capacity`` tokens.

    Raises ValueError for a row that is longer than that.
    """
    order = random.Random(f"pack {seed}").sample(range(len(lengths)), len(lengths))
    sequences: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        by_length = sorted(order[start : start + WINDOW], key=lambda index: -lengths[index])
        sequences += _best_fit(by_length, lengths, capacity)
    return sequences


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, place in sequences), sorted
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a row of {length} tokens does not fit into a sequence of {capacity}")
        fullest = bisect.bisect_left(room, (length, -1))
        left, place = room.pop(fullest) if fullest < len(room) else (capacity, len(sequences))
        if place == len(sequences):
            sequences.append([])
        sequences[place].append(index)
        bisect.insort(room, (left - length, place))
    return sequences


class PackedRows(MadeRows):
    """``rows`` packed into sequences of up to ``capacity`` tokens; a sequence is joined when it is asked for."""

    def __init__(self, rows: Sequence[Row], capacity: int, seed: int) -> None:
        own = lengths_of(rows)
        self._rows, self._capacity = rows, capacity
        self._sequences = pack(own, capacity, seed)
        self.lengths = [sum(own[index] for index in sequence) for sequence in self._sequences]

    def row(self, place: int) -> Row:
        """The row at ``place``, from 0."""
        return join([self._rows[index] for index in self._sequences[place]])

    @property
    def efficiency(self) -> float:
        """The share of the sequences' capacity that is tokens and not padding."""
        return sum(self.lengths) / (self._capacity * len(self))


def join(rows: Sequence[Row]) -> Row:
    """One sequence of ``rows``. An example's first token has nothing before it: its label is ``IGNORE``."""
    ids: list[int] = []
    labels: list[int] = []
    starts = []
    for row in rows:
        starts.append(len(ids))
        ids += row.ids
        labels += [IGNORE, *row.labels[1:]]
    return Row(ids, labels, tuple(_flat(row.sources for row in rows)), tuple(starts))


def _flat(parts: Any) -> Iterator[str]:
    for part in parts:
        yield from part


LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How much the logits of an example may change, in their own standard deviations, when its neighbour does: nothing but
rounding. A model whose layers carry state along the sequence is off by one or more."""


@torch.no_grad()
def check_packing(model: Any, sequences: int) -> None:
    """Raise UserError for a model that lets packed examples see each other, which depends on its architecture and on
    its attention: the second example of a sequence must give the same logits whatever the first one is.

    ``sequences`` are those of one forward pass. Collective where the model is sharded.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, second = ([(step * i + 1) % vocabulary for i in range(16)] for step in (3, 5, 7))
    device = next(model.parameters()).device
    examples = [join([Row(ids, ids), Row(second, second)]) for ids in (first, other)]
    with evaluation_mode(model):
        seen_ST = [
            model(**collate([example] * sequences, device).inputs, use_cache=False).logits[:, 16:].float()
            for example in examples
        ]
    spread = seen_ST[0].std()
    change = (seen_ST[0] - seen_ST[1]).abs().max() / spread
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not change <= LEAK[dtype]:
        raise UserError(
            f"packing: in {type(model).__name__} with {sequences} sequences in a pass, packed examples see each "
            f"other (logits move by {float(change):.2g} standard deviations): give packing=false"
        )
