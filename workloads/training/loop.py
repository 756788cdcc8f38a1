"""The training loop. Pretraining, fine-tuning and each trial of a sweep run these lines, on one device or on many.

    history = train(model, Batches(rows, 16, seed=0), config, validation=held_out, events=events)

Every rank calls ``train`` with the same arguments and a model that is already on its device and, with several ranks,
sharded (``fsdp.shard``). The same global batch gives the same loss on any number of ranks: the loss is a sum over the
batch's target tokens divided by how many the *whole* batch has, and a rank takes every ``world``-th sequence of it.
Another ``Objective`` may weigh rows otherwise.
Whatever is random at a step is seeded by the step, so a resumed run needs no state but weights, moments and history.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from profiling import mark
from workloads.training.batches import Row, StepBatches
from workloads.training.config import TrainingConfig
from workloads.training.divergence import LossWatch
from workloads.training.fsdp import computes_on, evaluation_mode, global_norm_clip, last_backward
from workloads.training.history import History
from workloads.training.losses import training_loss
from workloads.training.objective import NextToken, Objective
from workloads.training.samples import Sampler
from workloads.training.throughput import Meter
from workloads.training.zero import AnyOptimizer, ZeroOptimizer


class Events(Protocol):
    """What the loop tells its surroundings: a Ray Train worker, a Tune trial or a test."""

    def log(self, step: int, **values: float) -> None:
        """Called on every rank, with losses that are the same on all."""

    def checkpoint(self, history: History, model: nn.Module, optimizer: AnyOptimizer) -> None:
        """Called on every rank after ``history.step`` steps; may be collective."""


def train(
    model: nn.Module,
    batches: StepBatches,
    config: TrainingConfig,
    *,
    validation: Sequence[Row],
    events: Events,
    optimizer: AnyOptimizer,
    objective: Objective | None = None,
    history: History | None = None,
    sampler: Sampler | None = None,
) -> History:
    """Train the parameters of ``optimizer`` up to ``config.steps`` or an early stop; returns the losses.

    ``objective`` is the loss of ``config`` on the next token, where nothing else is given. ``history`` is what a
    checkpoint had, where training goes on from one. Raises Diverged, on every rank, where there is nothing left to
    train.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = computes_on(model)
    history = history or History()
    watch = LossWatch(history, config.divergence, batches, device, remember=config.log_every)
    meter = Meter(model, device, config.compute_dtype)
    objective = objective or NextToken(training_loss(config), config.loss_chunk)
    zero = optimizer if isinstance(optimizer, ZeroOptimizer) else None
    model.train()

    while history.step < config.steps and not history.stopped_early:
        step = history.step
        torch.manual_seed(hash((config.seed, step, rank)))  # dropout: the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)

        batch = batches[step]
        weight = sum(map(objective.weight, batch))
        watched = torch.zeros(1 + len(objective.figures), device=device)
        micro_batches = list(_micro_batches(batch[rank::world], config.micro_batch_size))
        for number, rows in enumerate(micro_batches):
            final = number == len(micro_batches) - 1
            last_backward(model, final)  # shards meet once a step
            sums = objective(zero.engine if zero else model, rows, device)
            loss = sums.objective * world / weight  # gradients are averaged over ranks; the loss is a sum
            zero.backward(loss, final) if zero else loss.backward()
            watched += sums.watched / weight
        if zero:  # clips and steps at once, and leaves out a step whose gradient is no number
            norm = zero.update()
            watch.add(step + 1, watched, norm)
        else:
            norm = global_norm_clip(model, config.gradient_clip)
            watch.add(step + 1, watched, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.add(batch)
        if rank == 0:
            mark("step", step + 1, tokens=sum(len(row.ids) for row in batch))

        history.step = done = step + 1
        last = done == config.steps
        row: dict[str, float] = {}
        if validation and (last or _due(done, config.validate_every)):
            watch.look()
            with meter.aside():
                at_once = config.micro_batch_size * world or config.batch_size
                means = held_out_means(model, validation, at_once, device, objective)
            watch.look_at_held_out(done, means["loss"])
            row |= {f"validation_{name}": mean for name, mean in means.items()}
            history.validation.append((done, row["validation_loss"]))
            if config.early_stopping is not None and not last:
                last = history.stopped_early = history.is_out_of_patience(config.early_stopping)
        if last or _due(done, config.log_every):
            watch.look()
            row |= dict(zip(("loss", *objective.figures), history.log(), strict=True))
            row |= {"learning_rate": learning_rate(config, step), "gradient_norm": float(norm)}
            row |= meter.read()
        if row:
            events.log(done, **row)
        if sampler is not None and sampler.due(done):
            with meter.aside():
                sampler(done, model)
        best = config.keep_best and "validation_loss" in row and history.is_best
        if done < config.steps and (best or _due(done, config.checkpoint_every)):
            watch.look()
            events.checkpoint(history, model, optimizer)
    return history


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to ``final_learning_rate`` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


@torch.no_grad()
def held_out_means(
    model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device, objective: Objective | None = None
) -> dict[str, float]:
    """The mean loss and figures of ``objective`` over ``rows``, the same on every rank; without one ``loss`` is
    cross-entropy in nats per target token."""
    objective = objective or NextToken()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = max(1, batch_size // world)
    by_length = sorted(rows, key=lambda row: len(row.ids))  # alike lengths pad little
    total = torch.zeros(1 + len(objective.figures), dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for start in range(0, len(by_length), share * world):  # as many forwards on every rank: they are collective
            rest = by_length[start : start + share * world]
            mine = rest[rank::world] or rest[:1]
            counted = 1.0 if rest[rank::world] else 0.0
            total += counted * objective(model, mine, device).watched
    means = _sum_over_ranks(total) / sum(map(objective.weight, rows))
    return dict(zip(("loss", *objective.figures), means.tolist(), strict=True))


def _micro_batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    size = size or len(rows)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _sum_over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
