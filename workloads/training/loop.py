"""The training loop. Pretraining, fine-tuning and each trial of a sweep run these lines, on one device or on many.

    history = train(model, Batches(rows, 16, seed=0), config, validation=held_out, events=events)

Every rank calls ``train`` with the same arguments and a model that is already on its device and, with several ranks,
sharded (``fsdp.shard``). The same global batch gives the same loss on any number of ranks: the loss is a sum over the
batch's target tokens divided by how many the *whole* batch has, and a rank takes every ``world``-th sequence of it.
Whatever is random at a step is seeded by the step, so a resumed run needs no state but weights, moments and the step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.training.batches import Batches, Row
from workloads.training.config import LOSS_CHUNK, TrainingConfig
from workloads.training.fsdp import evaluation_mode, global_norm_clip, last_backward
from workloads.training.losses import summed_loss, training_loss


class Events(Protocol):
    """What the loop tells its surroundings: a Ray Train worker, a Tune trial or a test."""

    def log(self, step: int, **values: float) -> None:
        """Called on rank 0 alone, with scalars that are the same on all ranks."""

    def checkpoint(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called on every rank after ``step`` steps; may be collective."""


@dataclass
class History:
    """Loss curves: (steps done, mean cross-entropy in nats per target token), whatever else is minimised."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    *,
    validation: Sequence[Row],
    events: Events,
    optimizer: torch.optim.Optimizer,
    start: int = 0,
) -> History:
    """Train the parameters of ``optimizer`` from step ``start`` to ``config.steps``; returns the losses.

    Raises FloatingPointError when the loss is no longer finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    history = History()
    loss_since_log = torch.zeros((), dtype=torch.float64, device=device)
    steps_since_log = 0
    minimised = training_loss(config)
    model.train()

    for step in range(start, config.steps):
        torch.manual_seed(hash((config.seed, step, rank)))  # dropout: the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)

        batch = batches[step]
        targets = sum(row.targets for row in batch)
        micro_batches = list(_micro_batches(batch[rank::world], config.micro_batch_size))
        for number, rows in enumerate(micro_batches):
            last_backward(model, number == len(micro_batches) - 1)  # shards meet once a step
            losses = summed_loss(model, rows, device, minimised, config.loss_chunk)
            (losses.objective * world / targets).backward()  # FSDP averages gradients over ranks; the loss is a sum
            loss_since_log += losses.cross_entropy / targets
        norm = global_norm_clip(model, config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done, steps_since_log = step + 1, steps_since_log + 1
        if done % config.log_every == 0 or done == config.steps:
            mean = float(_sum_over_ranks(loss_since_log)) / steps_since_log
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {done}: lower learning_rate")
            history.train.append((done, mean))
            if rank == 0:
                events.log(done, loss=mean, learning_rate=learning_rate(config, step), gradient_norm=float(norm))
            loss_since_log.zero_()
            steps_since_log = 0
        if validation and (done == config.steps or (config.validate_every and done % config.validate_every == 0)):
            held_out = mean_loss(model, validation, config.batch_size, device, config.loss_chunk)
            history.validation.append((done, held_out))
            if rank == 0:
                events.log(done, validation_loss=held_out)
        if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
            events.checkpoint(done, model, optimizer)
    return history


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to ``final_learning_rate`` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


@torch.no_grad()
def mean_loss(
    model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device, chunk: int = LOSS_CHUNK
) -> float:
    """Mean cross-entropy in nats per target token over ``rows``, the same on every rank."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = max(1, batch_size // world)
    by_length = sorted(rows, key=lambda row: len(row.ids))  # alike lengths pad little
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for start in range(0, len(by_length), share * world):  # as many forwards on every rank: they are collective
            rest = by_length[start : start + share * world]
            mine = rest[rank::world] or rest[:1]
            weight = 1.0 if rest[rank::world] else 0.0
            total += weight * summed_loss(model, mine, device, chunk=chunk).cross_entropy
    return float(_sum_over_ranks(total)) / sum(row.targets for row in rows)


def _micro_batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    size = size or len(rows)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _sum_over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
