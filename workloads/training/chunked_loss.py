"""The loss of a causal language model without the logits of the whole batch (fused linear cross-entropy).

    losses = loss_of(model, {"input_ids": ids_BT}, labels_BT, cross_entropy, chunk=512)

Logits are vocabulary / hidden size times as large as the hidden states that they are made from. Here they exist for
``chunk`` target tokens at a time, and for no other position: the forward pass takes the chunk's loss and, by autograd,
its gradient with respect to the hidden states and to the trained weights of the head; the backward pass only scales
these. Known from Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), whose gradient is written out by hand for one loss.

The loss becomes the output of the model's own forward pass, so whatever surrounds it (PEFT, FSDP2's gathering of the
root's parameters) works as ever. What a model does between hidden states and logits (soft-capping, scaling, an adapter
or 4-bit weights in the head) is its own code, run on each chunk, and is neither known nor repeated here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from workloads.training.batches import IGNORE

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_NV in float32, labels_N without IGNORE) -> a scalar: the sum over the N target tokens."""

Logits = Callable[[Tensor], Tensor]
"""hidden_NH -> logits_NV."""

Made = TypeVar("Made")


class Losses(NamedTuple):
    """Sums over target tokens, scalars in float32. ``cross_entropy``, in nats, is detached: it is for reports."""

    objective: Tensor
    cross_entropy: Tensor


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy in nats, summed."""
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def loss_of(model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor, loss: LossFunction, chunk: int) -> Losses:
    """The loss of predicting each label of ``labels_BT`` but ``IGNORE`` from the position before it.

    ``inputs`` are the model's own keywords. ``chunk`` is in tokens; 0 makes the logits of all target tokens at once.
    A model whose hidden states cannot be had apart from its logits gets its logits whole.
    """

    def whole(logits_NV: Tensor, labels_N: Tensor) -> Losses:
        return _plain(logits_NV, labels_N, loss)

    def cut(hidden_NH: Tensor, labels_N: Tensor, logits_of: Logits, weights: list[nn.Parameter]) -> Losses:
        return chunked_loss(hidden_NH, labels_N, logits_of, weights, loss, chunk)

    return at_targets(model, inputs, labels_BT, whole, cut if chunk else None)


def log_probabilities_of(model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor, chunk: int) -> Tensor:
    """The log-probability of each label of ``labels_BT`` but ``IGNORE``, given the tokens before it: a vector in
    float32, row after row. For losses in which a token's weight is known only when all have been seen.

    ``chunk`` is as in ``loss_of``; the logits of a chunk are made again in the backward pass.
    """

    def cut(hidden_NH: Tensor, labels_N: Tensor, logits_of: Logits, _: list[nn.Parameter]) -> Tensor:
        def piece(hidden_CH: Tensor, labels_C: Tensor) -> Tensor:
            return _chosen(logits_of(hidden_CH), labels_C)

        pieces = zip(hidden_NH.split(chunk), labels_N.split(chunk), strict=True)
        return torch.cat([checkpoint(piece, *each, use_reentrant=False) for each in pieces])

    return at_targets(model, inputs, labels_BT, _chosen, cut if chunk else None)


def at_targets(
    model: nn.Module,
    inputs: dict[str, Any],
    labels_BT: Tensor,
    whole: Callable[[Tensor, Tensor], Made],
    cut: Callable[[Tensor, Tensor, Logits, list[nn.Parameter]], Made] | None,
) -> Made:
    """What ``cut`` makes, within the model's forward pass, of the hidden states that predict a target, its label, the
    way to logits, and the trained weights on that way; or ``whole`` of logits and labels where there is no cut."""
    causal = _causal(model)
    targets_BT = labels_BT[:, 1:] != IGNORE
    labels_N = labels_BT[:, 1:][targets_BT]
    if causal is None:
        return whole(model(**inputs).logits[:, :-1][targets_BT], labels_N)
    body, own_forward, body_forward = causal.base_model, causal.forward, causal.base_model.forward
    outputs: list[Any] = []

    def forward_at_targets(*args: Any, **kwargs: Any) -> Any:
        """The body's answer at target positions: all of them as one row, or none where chunks come later."""
        output = body_forward(*args, **kwargs)
        hidden_1NH = output.last_hidden_state[:, :-1][targets_BT][None]
        outputs.append(replace(output, last_hidden_state=hidden_1NH))
        return replace(output, last_hidden_state=hidden_1NH[:, :0]) if cut else outputs[0]

    def logits_of(hidden_NH: Tensor) -> Tensor:
        """The model's own way from hidden states to logits."""
        output = replace(outputs[0], last_hidden_state=hidden_NH[None])
        with _forward(body, lambda *_, **__: output):
            logits_NV: Tensor = own_forward(use_cache=False).logits[0]
            return logits_NV

    def forward_to_result(*args: Any, **kwargs: Any) -> Made:
        with _forward(body, forward_at_targets):
            logits = own_forward(*args, **kwargs).logits
        if not outputs:  # this model's forward does not call its body as a module
            return whole(logits[:, :-1][targets_BT], labels_N)
        if cut is None:
            return whole(logits[0], labels_N)
        return cut(outputs[0].last_hidden_state[0], labels_N, logits_of, _trained(causal, body))

    with _forward(causal, forward_to_result):
        made: Made = model(**inputs, use_cache=False)
        return made


def chunked_loss(
    hidden_NH: Tensor,
    labels_N: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    weights: list[nn.Parameter],
    loss: LossFunction,
    chunk: int,
) -> Losses:
    """The loss of ``logits_of(hidden_NH)``, made for ``chunk`` tokens at a time. No label is IGNORE.

    ``weights`` are the trained parameters that ``logits_of`` uses. The gradient with respect to them is summed over
    chunks in float32 at least.
    """
    if torch.is_grad_enabled() and (hidden_NH.requires_grad or weights):
        return Losses(*_ChunkedLoss.apply(labels_N, logits_of, loss, chunk, hidden_NH, *weights))
    total = _zeros(hidden_NH)
    for hidden_CH, labels_C in zip(hidden_NH.split(chunk), labels_N.split(chunk), strict=True):
        if len(labels_C):
            total = _add(total, _plain(logits_of(hidden_CH), labels_C, loss))
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Sums loss and gradients over chunks in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        labels_N: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        loss: LossFunction,
        chunk: int,
        hidden_NH: Tensor,
        *weights: nn.Parameter,
    ) -> Losses:
        ctx.dtypes = [weight.dtype for weight in weights]
        gradient_NH = torch.zeros_like(hidden_NH) if hidden_NH.requires_grad else None
        gradients = [torch.zeros_like(weight, dtype=_at_least_float32(weight)) for weight in weights]
        total = _zeros(hidden_NH)
        for start in range(0, len(labels_N), chunk):
            piece = slice(start, start + chunk)
            with torch.enable_grad():
                hidden_CH = hidden_NH[piece].detach().requires_grad_(hidden_NH.requires_grad)
                losses = _plain(logits_of(hidden_CH), labels_N[piece], loss)
            wanted = [hidden_CH, *weights] if hidden_NH.requires_grad else list(weights)
            found = list(torch.autograd.grad(losses.objective, wanted, allow_unused=True))
            total = _add(total, losses)
            if gradient_NH is not None and (gradient_CH := found.pop(0)) is not None:
                gradient_NH[piece] = gradient_CH
            for summed in reversed(gradients):  # no name keeps a gradient alive while the next one is made
                _add_in_place(summed, found.pop())
        ctx.save_for_backward(gradient_NH, *gradients)
        ctx.mark_non_differentiable(total.cross_entropy)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NH, *gradients = ctx.saved_tensors
        scaled = [(gradient * above).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, None, None if gradient_NH is None else gradient_NH * above, *scaled


def _plain(logits_NV: Tensor, labels_N: Tensor, loss: LossFunction) -> Losses:
    logits_NV = logits_NV.to(_at_least_float32(logits_NV))
    objective = loss(logits_NV, labels_N)
    with torch.no_grad():
        return Losses(objective, objective.clone() if loss is cross_entropy else cross_entropy(logits_NV, labels_N))


def _chosen(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """The log-probability of each label."""
    logits_NV = logits_NV.to(_at_least_float32(logits_NV))
    return logits_NV.gather(-1, labels_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def _zeros(like: Tensor) -> Losses:
    return Losses(*(like.new_zeros((), dtype=_at_least_float32(like)) for _ in Losses._fields))


def _add(total: Losses, losses: Losses) -> Losses:
    return Losses(*(first + second.detach() for first, second in zip(total, losses, strict=True)))


def _add_in_place(summed: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        summed += gradient


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _causal(model: nn.Module) -> Any:
    """The Transformers model in ``model``, whatever wraps it, if its body is a module of its own; otherwise None."""
    for module in model.modules():
        if body := getattr(type(module), "base_model_prefix", None):
            return module if body in module._modules else None
    return None


def head_of(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """The Transformers model in ``model`` and the trained weights from which it makes logits of hidden states; none
    where its logits come whole."""
    causal = _causal(model)
    return (model, []) if causal is None else (causal, _trained(causal, causal.base_model))


def _trained(causal: nn.Module, body: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of all but the body, those that the head shares with it included, each once."""
    outside = [*causal.parameters(recurse=False)]
    for child in causal.children():
        outside += [] if child is body else child.parameters()
    return [weight for weight in dict.fromkeys(outside) if weight.requires_grad]


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have ``forward`` in the place of the module's own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
