"""The loss of rows, as the sum over their target tokens, and the losses that training may ask for."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from workloads.training.batches import Row, collate
from workloads.training.chunked_loss import Losses, LossFunction, cross_entropy, loss_of
from workloads.training.config import LOSS_CHUNK, TrainingConfig


def summed_loss(
    model: nn.Module,
    rows: Sequence[Row],
    device: torch.device,
    loss: LossFunction = cross_entropy,
    chunk: int = LOSS_CHUNK,
) -> Losses:
    """``loss`` over the target tokens of ``rows``, and their cross-entropy for reports.

    Logits are made only at positions that predict a target, ``chunk`` of them at a time.
    """
    batch = collate(rows, device)
    return loss_of(model, batch.inputs, batch.labels_BT, loss, chunk)


def training_loss(config: TrainingConfig) -> LossFunction:
    """What ``config`` says to minimise."""
    if not config.label_smoothing and not config.z_loss:
        return cross_entropy
    return partial(regularised_cross_entropy, label_smoothing=config.label_smoothing, z_loss=config.z_loss)


def regularised_cross_entropy(logits_NV: Tensor, labels_N: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropy against the label mixed with the uniform distribution, plus ``z_loss`` times log squared of the
    softmax's normaliser, summed.

    Label smoothing is Szegedy et al. 2015, arXiv:1512.00567; z-loss, Chowdhery et al. 2022, arXiv:2204.02311.
    """
    normaliser_N = logits_NV.logsumexp(-1)
    chosen_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    mean_N = logits_NV.mean(-1)
    smoothed_N = normaliser_N - (1 - label_smoothing) * chosen_N - label_smoothing * mean_N
    return (smoothed_N + z_loss * normaliser_N**2).sum()
