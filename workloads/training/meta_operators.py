"""Operators for running a training step on torch's meta device that keep what those of a card, or of a CPU, keep.

    use_given_mask(model)
    with operators_of("cuda"):
        model(**inputs)

The meta device's own attention keeps the scores of all pairs of tokens. A card takes flash attention without a mask,
memory-efficient attention with one (of float32 always); a CPU has its own flash attention, which keeps other tensors.
See https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

UNMASKED = "sdpa_unmasked"


def use_given_mask(model: Any) -> None:
    """Have a Transformers model use the mask that it is given, or none: it would make one by looking at values."""
    ALL_ATTENTION_FUNCTIONS.register(UNMASKED, sdpa_attention_forward)
    if hasattr(model.config, "_attn_implementation"):
        model.config._attn_implementation = UNMASKED


@contextmanager
def operators_of(device: str) -> Iterator[None]:
    """Have attention taken by the operator that ``device`` (cuda or cpu) would take, also where a layer is recomputed,
    ``grouped_mm`` in any dtype, every label counted as a target, and autocast, which the meta device has not and PEFT
    turns off for a stack of experts, be that of ``device``."""
    import torch.fx.experimental._config as config

    attention, grouped, autocast = F.scaled_dot_product_attention, F.grouped_mm, torch.autocast
    functional: Any = F
    everything: Any = torch
    functional.scaled_dot_product_attention = partial(_attend, device)
    functional.grouped_mm = _grouped
    everything.autocast = partial(_autocast, device)
    try:
        with config.patch(meta_nonzero_assume_all_nonzero=True):
            yield
    finally:
        functional.scaled_dot_product_attention, functional.grouped_mm = attention, grouped
        everything.autocast = autocast


def _autocast(device: str, device_type: str, **settings: Any) -> Any:
    return torch.amp.autocast(device if device_type == "meta" else device_type, **settings)


class _Grouped(torch.autograd.Function):
    """``grouped_mm(x_SI, weights_EIO)`` as far as memory goes."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weights_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_SI, weights_EIO)
        return x_SI.new_empty(len(x_SI), weights_EIO.shape[2])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        made = [
            torch.empty_like(saved) if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        return made[0], made[1]


def _grouped(x_SI: Tensor, weights_EIO: Tensor, **_: Any) -> Tensor:
    out: Tensor = _Grouped.apply(x_SI, weights_EIO)
    return out


def _attend(
    device: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    aten = torch.ops.aten
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    out: Tensor
    if device == "cpu":
        out, *_ = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif attn_mask is None and query.dtype.itemsize == 2:
        out, *_ = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
    else:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        out, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )
    return out
