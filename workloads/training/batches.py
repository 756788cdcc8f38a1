"""Token rows, the global batch of each step, and its padded tensors."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from workbench.errors import UserError
from workloads.training.dealing import Deal, Epoch, Window, best_fit

IGNORE = -100
"""A label that is not trained on, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Row:
    """One sequence: token ``ids``, and ``labels`` of the same length with ``IGNORE`` where nothing is learned.

    ``sources`` names the documents it was made of, for people. ``starts`` has where each packed example begins, and is
    empty for a sequence that is one example; the label of an example's first token is then ``IGNORE``.
    """

    ids: list[int]
    labels: list[int]
    sources: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()

    @property
    def targets(self) -> int:
        """How many of its tokens are predicted: the first has nothing before it."""
        return sum(label != IGNORE for label in self.labels[1:])


class MadeRows(Sequence[Row]):
    """Rows that are made when they are asked for; ``lengths`` has that of each in tokens."""

    lengths: Sequence[int]

    @abstractmethod
    def row(self, place: int) -> Row:
        """The row at ``place``, from 0."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        places = range(len(self))[place]
        return self.row(places) if isinstance(places, int) else [self.row(each) for each in places]


def lengths_of(rows: Sequence[Row]) -> Sequence[int]:
    """The length of each row in tokens, from ``rows.lengths`` where the sequence knows them without reading rows."""
    known: Sequence[int] | None = getattr(rows, "lengths", None)
    return [len(row.ids) for row in rows] if known is None else known


def join(rows: Sequence[Row]) -> Row:
    """One sequence of ``rows``. An example's first token has nothing before it: its label is ``IGNORE``."""
    ids: list[int] = []
    labels: list[int] = []
    starts = []
    for row in rows:
        starts.append(len(ids))
        ids += row.ids
        labels += [IGNORE, *row.labels[1:]]
    return Row(ids, labels, tuple(source for row in rows for source in row.sources), tuple(starts))


class StepBatches(Protocol):
    """The global batch of any step, the same on every rank and whenever it is asked for."""

    def __getitem__(self, step: int) -> list[Row]:
        """The sequences of ``step``, from 0."""

    def sources(self, step: int) -> tuple[str, ...]:
        """The documents that they were made of."""


class Batches:
    """Batches of ``rows`` that all lie ready, dealt anew in every epoch (``dealing.py``); with a ``capacity`` rows are
    packed into sequences of so many tokens. Raises UserError where the rows fill no batch.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int, capacity: int = 0) -> None:
        self.rows, self._deal = rows, Deal(batch_size, seed, capacity)
        self._lengths = lengths_of(rows)
        self._count, places = getattr(rows, "read", len(rows)), getattr(rows, "places", None)
        self._own = None if places is None else {int(place): own for own, place in enumerate(places)}
        if not any(window.batches for window in self._windows_of(0)):
            raise UserError(_too_few(rows, self._lengths, self._deal))
        self._begin(0, 0)

    def __getitem__(self, step: int) -> list[Row]:
        if step < self._first:
            self._begin(0, 0)
        while step >= self._first + len(self._batches):
            window = next(self._windows, None)
            if window is None:
                self._begin(self._epoch + 1, self._first + len(self._batches))
            else:
                self._batches += window.batches
        return self._rows_of(self._batches[step - self._first])

    def sources(self, step: int) -> tuple[str, ...]:
        """The documents of the batch of ``step``."""
        return tuple(source for row in self[step] for source in row.sources)

    def first_epoch(self) -> list[list[Row]]:
        """All batches of the first epoch."""
        return [self._rows_of(batch) for window in self._windows_of(0) for batch in window.batches]

    @property
    def efficiency(self) -> float:
        """The share of the first epoch's packed sequences that is tokens and not padding."""
        sequences = [each for window in self._windows_of(0) for batch in window.batches for each in batch]
        tokens = sum(self._lengths[row] for each in sequences for row in each)
        return tokens / (self._deal.capacity * len(sequences))

    def _begin(self, epoch: int, first: int) -> None:
        """``first`` is the step of the epoch's first batch."""
        self._epoch, self._first = epoch, first
        self._windows, self._batches = self._windows_of(epoch), list[list[list[int]]]()

    def _windows_of(self, number: int) -> Iterator[Window[int]]:
        epoch = Epoch(self._deal, self._count, number)
        order = epoch.order
        if self._own is not None:
            order = [self._own[place] for place in order if place in self._own]
        return epoch.windows(order, self._lengths.__getitem__)

    def _rows_of(self, batch: list[list[int]]) -> list[Row]:
        if self._deal.capacity:
            return [join([self.rows[index] for index in sequence]) for sequence in batch]
        return [self.rows[index] for (index,) in batch]


def _too_few(rows: Sequence[Row], lengths: Sequence[int], deal: Deal) -> str:
    if deal.capacity:
        sequences = len(best_fit(range(len(rows)), lengths.__getitem__, deal.capacity))
        return f"{sequences} packed sequences do not fill a batch: give batch_size={max(1, sequences)} or less"
    return f"{len(rows)} training rows do not fill a batch: give batch_size={len(rows)} or less"


class Collated(NamedTuple):
    """Rows as tensors, padded on the right to the longest.

    ``mask_BT`` is 1 on tokens and 0 on padding, None where there is none. Of packed rows it is None too: they have
    ``positions_BT``, which restart at 0 with every example and with the padding.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None

    @property
    def inputs(self) -> dict[str, Any]:
        """What a Transformers model is called with. It reads from positions alone that examples are packed, and keeps
        their attention apart (``transformers.masking_utils.find_packed_sequence_indices``), but only where there is no
        mask."""
        given = {"input_ids": self.ids_BT, "attention_mask": self.mask_BT, "position_ids": self.positions_BT}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def collate(rows: Sequence[Row], device: torch.device) -> Collated:
    """Pad ``rows`` on the right to the longest one."""
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros((len(rows), length), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    mask_BT = torch.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[index, : len(row.ids)] = torch.tensor(row.labels)
        mask_BT[index, : len(row.ids)] = 1
    if any(row.starts for row in rows):
        positions_BT = torch.stack([_positions(row, length) for row in rows])
        return Collated(ids_BT.to(device), labels_BT.to(device), None, positions_BT.to(device))
    return Collated(ids_BT.to(device), labels_BT.to(device), None if bool(mask_BT.all()) else mask_BT.to(device), None)


def _positions(row: Row, length: int) -> Tensor:
    """Positions of a packed row and its padding, which counts as an example of its own."""
    edges = sorted({0, *row.starts, len(row.ids), length})
    return torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(edges)])
