"""The training loop. Pretraining, fine-tuning and each trial of a sweep run these lines, on one device or on many.

    history = train(model, Batches(rows, 16, seed=0), config, validation=held_out, events=events)

Every rank calls ``train`` with the same arguments and a model that is already on its device and, with several ranks,
sharded (``fsdp.shard``). The same global batch gives the same loss on any number of ranks: the loss is a sum over the
batch's target tokens divided by how many the *whole* batch has, and a rank takes every ``world``-th sequence of it.
Whatever is random at a step is seeded by the step, so a resumed run needs no state but weights, moments and the step.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import UserError
from workloads.training.config import TrainingConfig
from workloads.training.fsdp import evaluation_mode, global_norm_clip, last_backward

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


class Events(Protocol):
    """What the loop tells its surroundings: a Ray Train worker, a Tune trial or a test."""

    def log(self, step: int, **values: float) -> None:
        """Called on rank 0 alone, with scalars that are the same on all ranks."""

    def checkpoint(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called on every rank after ``step`` steps; may be collective."""


@dataclass
class History:
    """Loss curves: (steps done, mean loss in nats per target token)."""

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
            loss = summed_loss(model, rows, device) / targets
            (loss * world).backward()  # FSDP averages gradients over ranks, and the loss is a sum over them
            loss_since_log += loss.detach()
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
            held_out = mean_loss(model, validation, config.batch_size, device)
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


def summed_loss(model: nn.Module, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Cross-entropy in nats, summed over the target tokens of ``rows``; a scalar in float32."""
    ids_BT, mask_BT, labels_BT = collate(rows, device)
    # Logits are made only from the first position that predicts a target: instructions are long, answers short.
    first = int((labels_BT[:, 1:] != IGNORE).any(0).int().argmax())
    kept = torch.arange(first, ids_BT.shape[1] - 1, device=device)
    logits_BKV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=kept).logits
    return F.cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BT[:, first + 1 :].flatten(), ignore_index=IGNORE, reduction="sum"
    )


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


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device) -> float:
    """Mean loss in nats per target token over ``rows``, the same on every rank."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = max(1, batch_size // world)
    by_length = sorted(rows, key=lambda row: len(row.ids))  # alike lengths pad little
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for start in range(0, len(by_length), share * world):  # as many forwards on every rank: they are collective
            rest = by_length[start : start + share * world]
            mine = rest[rank::world] or rest[:1]
            weight = 1.0 if rest[rank::world] else 0.0
            total += weight * summed_loss(model, mine, device)
    return float(_sum_over_ranks(total)) / sum(row.targets for row in rows)


def _micro_batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    size = size or len(rows)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _sum_over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
