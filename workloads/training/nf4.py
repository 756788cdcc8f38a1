"""Linear layers and stacks of experts in bitsandbytes' NF4, with every stored byte a parameter that FSDP2 shards.

NF4 with double quantisation is Dettmers et al. 2023, arXiv:2305.14314. A weight of n numbers is kept as

- ``weight``: n/2 bytes, each two places in a table of 16 numbers, the first in the high bits;
- ``absmax``: n/64 bytes, each the scale of 64 weights as a place in a table of 256 numbers;
- ``nested_absmax``: n/16384 float32, each the scale of 256 such scales, and the offset that is added to the product.

All three are stored as plain bytes: FSDP2 casts floating parameters to the dtype of the computation, bytes never. Only
the tables, 272 float32 for a whole model, are on every rank. bitsandbytes quantises; its packed bytes are taken as they
are. The forward pass undoes the quantisation and multiplies; the backward pass undoes it again, so that between the two
nothing but the bytes is kept.
"""

import functools
import importlib.util
import math
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.errors import Failure
from workloads.training.config import Kernel


def kernel_for(wanted: Kernel, device: torch.device) -> str:
    """The kernel that undoes NF4 on ``device``: as ``wanted``, where auto is Triton's on CUDA and bitsandbytes' on a
    CPU. Raises Failure for Triton where it is not installed."""
    if wanted == "auto":
        if device.type == "cuda":
            return "triton" if importlib.util.find_spec("triton") else "bitsandbytes"
        return "bitsandbytes" if device.type == "cpu" else "torch"
    if wanted == "triton" and not importlib.util.find_spec("triton"):
        raise Failure("nf4_kernel=triton, and Triton is not installed: give nf4_kernel=auto")
    return wanted


@torch.library.custom_op("workbench::nf4_undo", mutates_args=())
def undo(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor,
    shape: list[int], dtype: torch.dtype, kernel: str,
) -> Tensor:  # fmt: skip
    """The weights of ``shape`` in ``dtype``, bit for bit those of bitsandbytes, whichever ``kernel`` undoes them."""
    return _undo(weight, absmax, nested_absmax, tables, shape, dtype, kernel)


def _undo(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor,
    shape: list[int], dtype: torch.dtype, kernel: str,
) -> Tensor:  # fmt: skip
    nested = nested_absmax.view(torch.float32)
    if kernel == "triton":
        from workloads.training import nf4_kernel

        return nf4_kernel.undo(
            weight, absmax, nested, tables, torch.empty(shape, dtype=dtype, device=weight.device)
        )  # fmt: skip
    if kernel == "bitsandbytes":
        import bitsandbytes  # noqa: F401  # registers its operators

        scales = torch.ops.bitsandbytes.dequantize_blockwise(absmax, nested[:-1], tables[16:], 256, torch.float32)
        scales += nested[-1]
        rows = _rows(shape)
        return torch.ops.bitsandbytes.dequantize_4bit(weight.view(-1, 1), scales, 64, "nf4", rows, dtype).view(shape)
    scales = tables[16:][absmax.int()] * nested[:-1].repeat_interleave(256)[: len(absmax)] + nested[-1]
    code = torch.arange(256, device=weight.device)
    pairs = torch.stack((tables[code >> 4], tables[code & 15]), dim=1)  # what each byte means
    values = pairs[weight.int()].view(-1)
    whole = F.pad(values, (0, 64 * len(absmax) - len(values))).view(-1, 64) * scales[:, None]
    return whole.view(-1)[: len(values)].view(shape).to(dtype)


def _rows(shape: list[int]) -> list[int]:
    """A shape of as many numbers whose rows hold whole blocks: where they do not, bitsandbytes' kernel for AVX-512
    multiplies some values by the scale of their neighbours' block."""
    numbers = math.prod(shape)
    return shape if shape[-1] % 64 == 0 else [1, numbers] if numbers % 64 else [numbers // 64, 64]


@undo.register_fake
def _(weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, shape: list[int], dtype: torch.dtype,
      kernel: str) -> Tensor:  # fmt: skip
    return weight.new_empty(shape, dtype=dtype)


@torch.library.custom_op("workbench::nf4_linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, bias: Tensor | None,
    shape: list[int], kernel: str,
) -> Tensor:  # fmt: skip
    """``x [..., in] @ W.T + bias`` in the dtype of ``x``. One opaque operator: a compiler that saw the undone weight in
    the forward and the backward pass would keep it from one to the other."""
    return F.linear(x, _undo(weight, absmax, nested_absmax, tables, shape, x.dtype, kernel), bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, bias: Tensor | None,
      shape: list[int], kernel: str) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("workbench::nf4_linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor, weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, shape: list[int], kernel: str
) -> Tensor:
    """The gradient of ``linear`` by its input: ``grad [..., out] @ W``."""
    return grad.contiguous() @ _undo(weight, absmax, nested_absmax, tables, shape, grad.dtype, kernel)


@linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, shape: list[int],
      kernel: str) -> Tensor:  # fmt: skip
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.shape, ctx.kernel = inputs
    ctx.save_for_backward(*inputs[1:5])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise Failure("NF4 layers are frozen, their biases too: nothing but their input has a gradient")
    return (linear_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.kernel), *[None] * 7)


linear.register_autograd(_backward, setup_context=_save)


def packed_bytes(numbers: int) -> int:
    """The bytes that a weight of ``numbers`` takes in NF4: packed, and both levels of its scales."""
    scales = -(-numbers // 64)
    return -(-numbers // 2) + scales + 4 * (-(-scales // 256) + 1)


class PackedScales(nn.Module):
    """The scales and tables of one weight of ``shape``."""

    absmax: nn.Parameter
    nested_absmax: nn.Parameter
    tables: Tensor

    def _take_scales(self, state: Any, kernel: str) -> None:
        if not (state.quant_type == "nf4" and state.nested and (state.blocksize, state.state2.blocksize) == (64, 256)):
            raise Failure(f"not NF4 with double quantisation in blocks of 64 and 256: {state.as_dict()}")
        tables = _tables(state.absmax.device)
        if not tables.is_meta and not torch.equal(tables, torch.cat((state.code, state.state2.code))):
            raise Failure("not the tables of bitsandbytes' NF4: quantise the base anew")
        self.absmax = _frozen(state.absmax)
        self.nested_absmax = _frozen(torch.cat((state.state2.absmax, state.offset[None])))
        self.register_buffer("tables", tables, persistent=False)
        self.shape, self.kernel = list(state.shape), kernel


@functools.cache
def _tables(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return torch.cat((get_4bit_type("nf4", device=device), create_dynamic_map().to(device)))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.reshape(-1).view(torch.uint8), requires_grad=False)


class NF4Linear(PackedScales, nn.Linear):
    """A frozen linear layer made of bitsandbytes' ``layer`` (a quantised ``Linear4bit``), whose bytes it shares.

    Input and output are ``[..., in_features]`` and ``[..., out_features]``; it computes in ``compute_dtype``. Any eval
    or training mode gives the same bits: unlike bitsandbytes' layer, nothing is ever packed anew.
    """

    def __init__(self, layer: Any, kernel: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = layer.compute_dtype
        self.weight = _frozen(layer.weight.data)
        self.bias = layer.bias if layer.bias is None else layer.bias.requires_grad_(False)
        self._take_scales(layer.weight.quant_state, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = linear(
            x.to(self.compute_dtype), self.weight, self.absmax, self.nested_absmax, self.tables, bias,
            self.shape, self.kernel,
        )  # fmt: skip
        return y.to(x.dtype)


def quantized(layer: Any, compute_dtype: torch.dtype, kernel: str) -> NF4Linear:
    """The linear ``layer`` in NF4, quantised on the device that its weight is on, which may be the meta device."""
    from bitsandbytes.functional import create_dynamic_map, name2qmap, quantize_4bit
    from transformers.pytorch_utils import Conv1D

    # bitsandbytes keeps the first table that it makes: on the meta device it would be one without values
    name2qmap.setdefault("dynamic", create_dynamic_map())
    weight = layer.weight.data.T.contiguous() if isinstance(layer, Conv1D) else layer.weight.data  # GPT-2's: [in, out]
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    made = SimpleNamespace(
        in_features=weight.shape[1], out_features=weight.shape[0], compute_dtype=compute_dtype,
        bias=layer.bias, weight=SimpleNamespace(data=packed, quant_state=state),
    )  # fmt: skip
    return NF4Linear(made, kernel)


class NF4Stack(PackedScales):
    """What undoes a stacked weight ``[experts, ...]``: a parametrization of it, whose ``original`` are its bytes."""

    def __init__(self, state: Any, kernel: str) -> None:
        super().__init__()
        self.dtype = state.dtype
        self._take_scales(state, kernel)

    def forward(self, weight: Tensor) -> Tensor:
        """The whole stack in its dtype."""
        return undo(weight, self.absmax, self.nested_absmax, self.tables, self.shape, self.dtype, self.kernel)


def stacked_experts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Every weight ``[experts, ., .]`` of Transformers' expert modules: its module's name, the module, its own name."""
    return [
        (name, module, own)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def use_nf4_linear(model: nn.Module, kernel: str) -> None:
    """Replace each of bitsandbytes' 4-bit layers by an ``NF4Linear`` of the same bytes."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(name, NF4Linear(module, kernel))


def quantize_experts(model: nn.Module, device: torch.device, kernel: str, but: Collection[str] = ()) -> None:
    """Quantise the stacked experts on ``device``, one at a time, except those whose path ends with a name in ``but``.
    bitsandbytes' loading leaves them as they are: they are no linear layers."""
    from bitsandbytes.functional import quantize_4bit

    for path, module, name in stacked_experts(model):
        if any(f".{path}.{name}".endswith(f".{whole}") for whole in but):
            continue
        stack = getattr(module, name).data.to(device)
        packed, state = quantize_4bit(stack.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        setattr(module, name, _frozen(packed))
        parametrize.register_parametrization(module, name, NF4Stack(state, kernel), unsafe=True)
        module.forward = functools.partial(_undone_once, module.forward)


def _undone_once(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Undo a stack once for all of its experts, of which each reads its own part."""
    with parametrize.cached():
        return forward(*args, **kwargs)
