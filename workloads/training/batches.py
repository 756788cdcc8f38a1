"""Token rows, the global batch of each step, and its padded tensors."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import UserError

IGNORE = -100
"""A label that is not trained on, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Row:
    """One sequence: token ``ids``, and ``labels`` of the same length with ``IGNORE`` where nothing is learned."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many of its tokens are predicted: the first has nothing before it."""
        return sum(label != IGNORE for label in self.labels[1:])


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
            alike = sorted(order[start : start + window], key=lambda index: len(self.rows[index].ids))
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        draw.shuffle(batches)
        return batches


def collate(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pad on the right to the longest row: ids, attention mask (None where all are of one length) and labels."""
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros((len(rows), length), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    mask_BT = torch.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[index, : len(row.ids)] = torch.tensor(row.labels)
        mask_BT[index, : len(row.ids)] = 1
    return ids_BT.to(device), None if bool(mask_BT.all()) else mask_BT.to(device), labels_BT.to(device)
