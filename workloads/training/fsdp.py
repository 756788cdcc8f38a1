"""FSDP2: one ``fully_shard`` per decoder layer, and what differs between a sharded model and a whole one.

See https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from workbench.errors import Failure


def shard(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Shard ``model`` in place over all ranks of the default process group.

    Each decoder layer is gathered for its own forward and backward; embeddings, final norm and head form the root.
    Call it before any forward pass: on CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in a forward pass.
    Raises Failure where 4-bit weights are stored in another dtype than the one FSDP would cast parameters to.
    """
    stored = {parameter.dtype for parameter in model.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=None if stored == {compute_dtype} else compute_dtype, reduce_dtype=torch.float32
    )
    check_storage(model, policy)
    for layer in decoder_layers(model):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def check_storage(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Refuse the combination that trains on noise: FSDP2 would cast packed 4-bit bytes as if they were numbers."""
    for name, parameter in model.named_parameters():
        if is_packed(parameter) and policy.param_dtype not in (None, parameter.dtype):
            raise Failure(
                f"{name} holds packed 4-bit weights in {parameter.dtype}, and FSDP would cast them to "
                f"{policy.param_dtype}: load with bnb_4bit_quant_storage={policy.param_dtype}"
            )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, by the class names that Transformers keeps whole (``_no_split_modules``)."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_packed(parameter: Tensor) -> bool:
    """Whether it holds 4-bit weights: bitsandbytes keeps a quantisation state beside them."""
    return getattr(parameter, "quant_state", None) is not None


def sharded_bytes(model: nn.Module) -> dict[str, int]:
    """What this rank stores: ``local`` bytes of all parameters, and the ``whole`` bytes they are shards of."""
    local = whole = 0
    for parameter in model.parameters():
        whole += parameter.numel() * parameter.element_size()
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local += mine.numel() * mine.element_size()
    return {"local": local, "whole": whole}


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter whole, on the CPU. Collective: all ranks call it. ``to_local`` would save one shard."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def last_backward(model: nn.Module, last: bool) -> None:
    """Reduce gradients over the ranks only in the last backward pass of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def global_norm_clip(model: nn.Module, limit: float) -> Tensor:
    """Clip the gradient to norm ``limit`` over all shards; returns the norm before."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm: Any = torch.nn.utils.clip_grad_norm_(trained, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside. bitsandbytes' layers stay in training mode: in evaluation they repack a gathered weight in
    place on CPUs with AVX512-BF16, and the next gather would mix the two layouts."""
    from bitsandbytes.nn import Linear4bit

    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
    try:
        yield
    finally:
        model.train()
