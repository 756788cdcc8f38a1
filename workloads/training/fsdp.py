"""FSDP2: one ``fully_shard`` per decoder layer, and what differs between a sharded model and a whole one.

See https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from workbench.errors import Failure
from workloads.training.nf4 import PackedScales
from workloads.training.zero import is_zero, whole_of


def shard(
    model: nn.Module, compute_dtype: torch.dtype, offload_from: torch.device | None = None,
    fill: Callable[[nn.Module], None] | None = None,
) -> None:  # fmt: skip
    """Shard ``model`` in place over all ranks of the default process group.

    Each decoder layer is gathered for its own forward and backward; embeddings, final norm and head form the root.
    With ``offload_from``, the device that computes, ``model`` is on the CPU, and shards, gradients and optimizer state
    stay in the host's memory: a layer's shards are copied to the device to be gathered, 4-bit weights as their bytes.
    ``fill`` reads the weights of a layer, or what is left of the model, right before they are sharded (``pieces.py``).
    Raises Failure where 4-bit weights are stored in a dtype that FSDP would cast.
    """
    stored = {parameter.dtype for parameter in model.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=None if stored == {compute_dtype} else compute_dtype, reduce_dtype=torch.float32
    )
    check_storage(model, policy)
    offload = OffloadPolicy()
    if offload_from is not None:
        offload = CPUOffloadPolicy(pin_memory=offload_from.type == "cuda")
    for part in (*decoder_layers(model), model):
        if fill is not None:
            fill(part)
        if offload_from is not None:
            _move_buffers(part, offload_from)
        fully_shard(part, mp_policy=policy, offload_policy=offload)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def computes_on(model: nn.Module) -> torch.device:
    """The device that ``model`` computes on, wherever its shards are kept."""
    parameter = next(model.parameters())
    kind = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else "cpu"
    if parameter.device.type != "cpu" or kind == "cpu":
        return parameter.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def check_storage(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Refuse what trains on noise: FSDP2 casts every floating parameter, packed 4-bit bytes as if they were numbers.

    An ``NF4Linear`` holds bytes, which are never cast. bitsandbytes' own layer holds them in ``quant_storage``, keeps
    its scales whole on every rank, and may pack its weights anew in a forward pass.
    """
    for name, parameter in model.named_parameters():
        whole = parameter.dtype.is_floating_point and policy.param_dtype not in (None, parameter.dtype)
        if is_packed(model, name) and whole:
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


def is_packed(model: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` holds 4-bit weights, or their scales: ours, or those of bitsandbytes' layer."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    packed = isinstance(module, PackedScales) or (isinstance(module, ParametrizationList) and own == "original")
    return (packed and own != "bias") or getattr(module._parameters[own], "quant_state", None) is not None


def sharded_bytes(model: nn.Module) -> dict[str, int]:
    """What this rank stores of all parameters: ``local`` bytes, of the ``whole`` that they are shards of; the same of
    4-bit weights alone (``local_packed``, ``whole_packed``) and of their scales (``local_scales``, ``whole_scales``).
    """
    held = dict.fromkeys(("local", "whole", "local_packed", "whole_packed", "local_scales", "whole_scales"), 0)
    for name, parameter in model.named_parameters():
        mine: Any = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's shard
        mine = mine.to_local() if isinstance(mine, DTensor) else mine
        numbers = getattr(parameter, "ds_numel", parameter.numel())
        kind = ""
        if is_packed(model, name):
            kind = "_scales" if name.endswith("absmax") else "_packed"
        for part, size in (("local", mine.numel() * mine.element_size()), ("whole", numbers * mine.element_size())):
            held[part] += size
            if kind:
                held[part + kind] += size
    return held


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter whole, on the CPU. Collective: all ranks call it. ``to_local`` would save one shard."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    if is_zero(model):
        return {name: whole_of(parameter).to("cpu", parameter.stored_dtype) for name, parameter in trained}
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in trained
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
    """No dropout inside."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
