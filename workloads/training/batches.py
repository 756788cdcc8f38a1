"""Token rows, the global batch of each step, and its padded tensors."""

import itertools
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from workbench.errors import UserError

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


class Batches:
    """The global batch of any step, as a pure function of the step.

    An epoch is a permutation drawn from the seed. Within each ``WINDOW`` batches of it, rows of like length share a
    batch, so that little is padded; then the batches are shuffled. Rows that fill no batch sit the epoch out.
    Raises UserError where the rows fill no batch at all.
    """

    WINDOW = 16

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        if len(rows) < batch_size:
            raise UserError(f"{len(rows)} training rows do not fill a batch: give batch_size={len(rows)} or less")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.per_epoch = len(rows) // batch_size
        self._lengths = lengths_of(rows)
        self._epoch, self._batches = -1, list[list[int]]()

    def __getitem__(self, step: int) -> list[Row]:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._deal(random.Random(f"{self.seed} {epoch}"))
        return [self.rows[index] for index in self._batches[number]]

    def _deal(self, draw: random.Random) -> list[list[int]]:
        order = draw.sample(range(len(self.rows)), self.per_epoch * self.batch_size)
        window = self.WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lambda index: self._lengths[index])
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        draw.shuffle(batches)
        return batches


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
