"""What the key ``strategy`` means: where a model is loaded, how it is sharded, and what updates it.

    model = load(loads_on(config, device))
    shard_model(model, config, device)
    optimizer = optimizer_of(model, config)

Without a process group every strategy is that of one device.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from workloads.training.adapters import trainable_parameters
from workloads.training.config import TrainingConfig
from workloads.training.fsdp import shard
from workloads.training.zero import AnyOptimizer, ZeroOptimizer


def loads_on(config: TrainingConfig, device: torch.device) -> torch.device:
    """Where the whole model is before it is sharded; ``device`` is what computes."""
    return torch.device("cpu") if _offloads(config) else device


def is_fsdp(config: TrainingConfig) -> bool:
    """Whether FSDP2 shards the model."""
    return dist.is_initialized() and config.strategy.startswith("fsdp2")


def shard_model(
    model: nn.Module, config: TrainingConfig, device: torch.device, fill: Callable[[nn.Module], None] | None = None
) -> None:
    """Shard ``model`` by FSDP2 where ``config`` says so. ``fill`` loads a part of it before that part is sharded.
    Collective."""
    if is_fsdp(config):
        shard(model, getattr(torch, config.compute_dtype), device if _offloads(config) else None, fill)


def optimizer_of(model: nn.Module, config: TrainingConfig) -> AnyOptimizer:
    """AdamW over the trained parameters, in DeepSpeed's hands where ``config`` says so. Collective."""
    optimizer = torch.optim.AdamW(
        trainable_parameters(model), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    if not (dist.is_initialized() and config.zero_stage):
        return optimizer
    computed = getattr(torch, config.compute_dtype)
    return ZeroOptimizer(model, optimizer, stage=config.zero_stage, clip=config.gradient_clip, computed=computed)


def _offloads(config: TrainingConfig) -> bool:
    return dist.is_initialized() and config.strategy == "fsdp2-offload"
