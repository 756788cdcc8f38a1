"""What the loop minimises, as a sum over rows, and what it watches meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from workloads.training.batches import Row
from workloads.training.chunked_loss import LossFunction, cross_entropy
from workloads.training.config import LOSS_CHUNK
from workloads.training.losses import summed_loss


class Sums(NamedTuple):
    """Sums over rows. ``objective`` is minimised; ``watched`` is for people and detached: the loss, then the figures.

    Both are divided by the rows' weight: a scalar, and a vector of 1 + F.
    """

    objective: Tensor
    watched: Tensor


class Objective(Protocol):
    """A mean over rows: their sums by their weight. The same sums come of any cut of a batch into micro batches."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what is watched beside the loss."""

    def weight(self, row: Row) -> int:
        """What ``row`` counts in the mean."""

    def __call__(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Sums:
        """The sums over ``rows``. Collective where the model is sharded."""


@dataclass(frozen=True)
class NextToken:
    """``loss`` per target token; what is watched is cross-entropy in nats, whatever is minimised."""

    loss: LossFunction = cross_entropy
    chunk: int = LOSS_CHUNK
    figures: tuple[str, ...] = field(default=(), init=False)

    def weight(self, row: Row) -> int:
        """Its target tokens."""
        return row.targets

    def __call__(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Sums:
        """The loss over the target tokens of ``rows``."""
        losses = summed_loss(model, rows, device, self.loss, self.chunk)
        return Sums(losses.objective, losses.cross_entropy[None])
