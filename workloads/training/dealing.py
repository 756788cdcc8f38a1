"""Which rows make which batch. The rows of an epoch come in its order, and each window of them becomes some batches.

    epoch = Epoch(Deal(batch_size=16, seed=0, capacity=2048), count=len(rows), number=0)
    for window in epoch.windows(epoch.order, lengths.__getitem__):
        window.batches  # lists of 16 sequences; a sequence is a list of places of rows

A window needs no row that stands behind it in the order. So rows that are tokenized while training runs make the same
batches as rows that all lie ready.

Without packing a window is ``WINDOW`` batches of rows; those of like length share a batch, so that little is padded.
With packing it is ``PACKED_WINDOW`` rows, put by best-fit decreasing: the longest first, each into the fullest sequence
that still has room (Johnson 1973, "Near-optimal bin packing algorithms"); sequences that fill no batch wait for the
next window. Then the batches, or the sequences, are shuffled. What fills no batch at the end sits the epoch out, or
stands in for rows that are left out of it.
"""

import bisect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

WINDOW = 16
"""Batches whose rows are dealt together."""

PACKED_WINDOW = 4096
"""Rows that are packed together: enough that short ones are found for every gap."""

T = TypeVar("T")


@dataclass(frozen=True)
class Deal:
    """``capacity`` is that of a packed sequence in tokens; 0: a row is a sequence."""

    batch_size: int
    seed: int
    capacity: int = 0


@dataclass(frozen=True)
class Window(Generic[T]):
    """Batches of ``batch_size`` sequences of rows; ``left`` are the sequences that the next window begins with."""

    number: int
    batches: list[list[list[T]]]
    left: list[list[T]]


class Epoch:
    """The ``number``-th pass over ``count`` rows. ``order`` has the places of the rows that take part."""

    def __init__(self, deal: Deal, count: int, number: int) -> None:
        self._deal, self._number = deal, number
        self._draw = random.Random(f"{deal.seed} {number}")
        whole = count if deal.capacity else count - count % deal.batch_size
        self.order = self._draw.sample(range(count), whole)
        if whole < count:
            taken = set(self.order)
            self.order += [place for place in range(count) if place not in taken]

    def windows(
        self, rows: Iterable[T], length: Callable[[T], int], first: int = 0, left: Sequence[list[T]] = ()
    ) -> Iterator[Window[T]]:
        """The windows of ``rows``, which come in ``order`` and may lack some of it; ``length`` is a row's in tokens.

        To begin in the middle, give the number of the ``first`` window, its rows and those after it, and what was
        ``left`` by the one before. Call it once. Raises ValueError for a row that is longer than a packed sequence.
        """
        batch_size, capacity = self._deal.batch_size, self._deal.capacity
        stream, waiting = iter(rows), list(left)
        for number in itertools.count(first):
            some = list(itertools.islice(stream, PACKED_WINDOW if capacity else WINDOW * batch_size))
            if not some:
                return
            draw = random.Random(f"{self._deal.seed} {self._number} {number}") if number else self._draw
            if capacity:
                sequences = waiting + best_fit(some, length, capacity)
                draw.shuffle(sequences)
                batches = _cut(sequences, batch_size)
                waiting = sequences[len(batches) * batch_size :]
            else:
                alike = sorted(some[: len(some) - len(some) % batch_size], key=length)
                batches = _cut([[row] for row in alike], batch_size)
                draw.shuffle(batches)
            yield Window(number, batches, waiting)


def _cut(sequences: list[T], size: int) -> list[list[T]]:
    whole = len(sequences) - len(sequences) % size
    return [sequences[start : start + size] for start in range(0, whole, size)]


def best_fit(rows: Sequence[T], length: Callable[[T], int], capacity: int) -> list[list[T]]:
    """``rows`` in sequences of up to ``capacity`` tokens, each row in one. Raises ValueError for a longer row."""
    sequences: list[list[T]] = []
    room: list[tuple[int, int]] = []  # (tokens left, place in sequences), sorted
    for row in sorted(rows, key=length, reverse=True):
        needs = length(row)
        if needs > capacity:
            raise ValueError(f"a row of {needs} tokens does not fit into a sequence of {capacity}")
        fullest = bisect.bisect_left(room, (needs, -1))
        free, place = room.pop(fullest) if fullest < len(room) else (capacity, len(sequences))
        if place == len(sequences):
            sequences.append([])
        sequences[place].append(row)
        bisect.insort(room, (free - needs, place))
    return sequences
