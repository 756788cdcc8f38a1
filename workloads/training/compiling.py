"""Recomputing and compiling decoder layers, each by itself.

Call it before ``fsdp.shard``: FSDP2's hooks then stay outside of what is recomputed and compiled, and a layer's weights
are gathered once for both. See https://docs.pytorch.org/docs/stable/checkpoint.html.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workloads.training.config import TrainingConfig
from workloads.training.fsdp import decoder_layers

RECOMPILE_LIMIT = 30
"""Times that a kind of layer is compiled; beyond it the layer runs uncompiled where no compiled code fits."""


def prepare_layers(model: nn.Module, config: TrainingConfig) -> None:
    """Have each decoder layer compiled, and recompute its activations in the backward pass, as ``config`` says.

    All layers of a kind share their compiled code, which leaves batch size and length open. What a graph would break on
    stands outside of it: the recomputation's bookkeeping, PEFT's context around the model, and the hook that makes the
    embeddings' output want a gradient (``gradient_checkpointing_enable`` adds it, and without reentrance nothing needs
    it). Generation with a cache, whose length would be compiled in, runs uncompiled.
    """
    for layer in decoder_layers(model):
        if config.compile:
            compiled = torch.compile(layer.forward, dynamic=True, recompile_limit=RECOMPILE_LIMIT)
            layer.forward = _unless_cached(compiled, layer.forward)
        if config.gradient_checkpointing:
            recomputed: Any = partial(checkpoint, layer.forward, use_reentrant=False)
            layer.forward = recomputed


def _unless_cached(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if kwargs.get("past_key_values") is None else plain)(*args, **kwargs)

    return forward
