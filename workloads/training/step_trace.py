"""What a training step keeps alive, layer by layer, found by running it on torch's meta device, without any memory.

    trace = trace_step(lambda: AutoModelForCausalLM.from_config(config), step)
    trace.layers[5].kept

The code that runs is the code that trains: Transformers' layers, PEFT's adapter, ``nf4.py``, ``chunked_loss.py``,
``compiling.py`` and autograd, so that whatever an architecture saves for its backward pass is seen, and nothing is
guessed. Layers of one kind are alike: one of each is run, and one more for the first, whose input wants no gradient.

Only a few operators are not those of the meta device: ``meta_operators.py``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from workloads.training.adapters import add_adapter, linear_layers, target_names
from workloads.training.chunked_loss import LossFunction, cross_entropy, log_probabilities_of, loss_of
from workloads.training.compiling import prepare_layers
from workloads.training.config import LOSS_CHUNK, AdapterConfig, TrainingConfig
from workloads.training.fsdp import decoder_layers
from workloads.training.meta_operators import operators_of, use_given_mask
from workloads.training.nf4 import NF4Linear, NF4Stack, quantize_experts, quantized
from workloads.training.tensor_bytes import TensorBytes

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward and backward pass of one rank over ``rows`` sequences of ``length`` tokens, each of them a target.

    ``masked`` says whether attention needs a mask: rows are padded, or packed. ``stored`` is the dtype of the base,
    ``computed`` that of the computation, to which sharding casts every parameter; shards are ``offloaded`` to the host
    or not, or are DeepSpeed's at ``zero_stage``; the base is loaded in ``pieces``, or whole. ``adapter`` is None where
    all weights are trained. ``pairs``: rows are chosen and rejected answers, whose log-probabilities are compared; then
    ``loss`` is not used.
    """

    rows: int
    length: int
    masked: bool = False
    adapter: AdapterConfig | None = None
    quantized: bool = False
    checkpointing: bool = False
    sharded: bool = False
    offloaded: bool = False
    pieces: bool = False
    zero_stage: int = 0
    stored: torch.dtype = torch.bfloat16
    computed: torch.dtype = torch.bfloat16
    loss: LossFunction = cross_entropy
    loss_chunk: int = LOSS_CHUNK
    pairs: bool = False
    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, its stored dtype, what it is in the step, and its part of the table."""

    shape: tuple[int, ...]
    stored: torch.dtype
    computed: torch.dtype
    trained: bool
    part: Literal["weights", "scales", "adapter"]
    undone: int
    """Bytes of the weight that an operator makes of it and frees: NF4 undone. 0 for all others."""
    parameters: int
    """Numbers that it stands for; of NF4's scales none."""

    @property
    def numbers(self) -> int:
        """Numbers that are stored."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the whole, as it is stored."""
        return self.numbers * self.stored.itemsize

    def shard(self, ranks: int) -> int:
        """Numbers of it that each of ``ranks`` holds: FSDP2 cuts the first dimension, padded to equal pieces."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:]) if self.shape else 1


@dataclass(frozen=True)
class Window:
    """A piece of the step, in bytes over what was alive at its start: the most, and what is left at its end."""

    peak: int
    change: int


@dataclass(frozen=True)
class LayerTrace:
    """A decoder layer: its weights and its passes. ``looked`` is its forward pass without gradients."""

    weights: list[Weight]
    forward: Window
    backward: Window
    looked: Window


@dataclass(frozen=True)
class Trace:
    """A step. ``before`` is all ahead of the first layer, ``loss`` all behind the last, ``head`` the backward pass from
    the loss to the last layer. The backward pass of the first layer has that of the embeddings in it."""

    layers: list[LayerTrace]
    root: list[Weight]
    before: Window
    loss: Window
    head: Window
    head_made: int
    """Bytes of gradients of the root that ``head`` leaves."""
    looked_before: Window
    looked_loss: Window
    width: int
    """Of the hidden states."""


def trace_step(make: Callable[[], Any], step: Step) -> Trace:
    """The trace of ``step`` on the model that ``make`` makes."""
    with META:
        model = make().to(step.stored)
    width = model.config.get_text_config(decoder=True).hidden_size
    use_given_mask(model)
    stack = _layer_list(model)
    kinds = [_kind(layer, f"{stack[0]}.{index}", step) for index, layer in enumerate(stack[1])]
    shown = [0, *(kinds.index(kind, 1) for kind in dict.fromkeys(kinds[1:]))]
    for index in range(len(kinds)):
        if index not in shown:
            stack[1][index] = nn.Module()  # keeps the names of the others
    if step.quantized:
        _quantize(model, step)
    if step.adapter is not None:
        model = add_adapter(model, step.adapter)
    layers = decoder_layers(model)
    holder = model.get_submodule(_parent_of(model, layers[0]))
    for index in reversed(range(len(kinds))):
        if index not in shown:
            del holder[index]
    weights = [_weights(layer, step) for layer in layers]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    root = _weights(model, step, but=inside)
    if step.sharded:
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.to(step.computed)
    prepare_layers(model, TrainingConfig(gradient_checkpointing=step.checkpointing))
    before, forward, loss, head, head_made, backward = _passes(model, layers, step)
    looked = _looks(model, layers, step)
    traced = [
        LayerTrace(weights[place], forward[place], backward[place], looked[1][place]) for place in range(len(layers))
    ]
    of_kind = {kinds[index]: traced[place] for place, index in enumerate(shown) if place}
    whole = [traced[0], *(of_kind[kind] for kind in kinds[1:])]
    return Trace(whole, root, before, loss, head, head_made, looked[0], looked[2], width)


def _layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    layers = set(decoder_layers(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and layers and set(module) <= layers:
            return name, module
    raise NotImplementedError(f"{type(model).__name__} has no list of decoder layers")


def _parent_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer).rpartition(".")[0]


def _kind(layer: nn.Module, path: str, step: Step) -> tuple[Any, ...]:
    """What makes two layers alike: their class, their parameters, and what the adapter's targets name in them."""
    parameters = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    names = target_names(step.adapter) if step.adapter is not None else []
    named = tuple(own for own, _ in layer.named_modules() if any(f"{path}.{own}".endswith(name) for name in names))
    return type(layer).__name__, parameters, named


def _quantize(model: Any, step: Step) -> None:
    for path, layer in linear_layers(model).items():
        model.set_submodule(path, quantized(layer, step.computed, "torch"))
    quantize_experts(model, META, "torch", target_names(step.adapter) if step.adapter is not None else ())


def _weights(module: nn.Module, step: Step, but: set[int] = frozenset()) -> list[Weight]:  # type: ignore[assignment]
    found = []
    for name, parameter in module.named_parameters():
        if id(parameter) in but:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        undone, stands_for = 0, parameter.numel()
        if isinstance(owner, NF4Linear) and name.endswith("weight"):
            stands_for = math.prod(owner.shape)
            undone = stands_for * step.computed.itemsize
        elif isinstance(owner, ParametrizationList) and isinstance(owner[0], NF4Stack):
            stands_for = math.prod(owner[0].shape)
        elif name.endswith("absmax"):
            stands_for = 0
        part: Literal["weights", "scales", "adapter"] = "scales" if name.endswith("absmax") else "weights"
        if parameter.requires_grad and step.adapter is not None:
            part = "adapter"
        cast = step.sharded and parameter.dtype.is_floating_point
        found.append(
            Weight(
                tuple(parameter.shape), parameter.dtype, step.computed if cast else parameter.dtype,
                parameter.requires_grad, part, undone, stands_for,
            )
        )  # fmt: skip
    return found


class _Marks:
    """Cuts what is counted into windows."""

    def __init__(self, counted: TensorBytes) -> None:
        self.counted, self.windows = counted, list[Window]()
        self._start = counted.peak = counted.now

    def __call__(self, *_: Any) -> None:
        """The end of a window, and the start of the next."""
        now = self.counted.now
        self.windows.append(Window(max(self.counted.peak, now) - self._start, now - self._start))
        self._start = self.counted.peak = now


def _passes(
    model: Any, layers: list[nn.Module], step: Step
) -> tuple[Window, list[Window], Window, Window, int, list[Window]]:
    model.train()
    inputs, labels_BT = _inputs(step)
    with operators_of(step.device), TensorBytes() as counted:
        marks = _Marks(counted)

        def end_of(_: Any, __: Any, output: Any) -> None:
            hidden_BTH = output[0] if isinstance(output, tuple) else output
            if hidden_BTH.requires_grad:
                hidden_BTH.register_hook(grown)
            marks()

        def grown(_: Tensor) -> None:
            marks()
            made.append(sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None))

        made = list[int]()
        hooks = [layers[0].register_forward_pre_hook(marks)]
        hooks += [layer.register_forward_hook(end_of) for layer in layers]
        objective = _objective(model, inputs, labels_BT, step, step.loss)
        marks()
        objective.backward()
        marks()
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    count = len(layers)
    windows = marks.windows
    before, forward, loss, head = windows[0], windows[1 : count + 1], windows[count + 1], windows[count + 2]
    return before, forward, loss, head, made[0], windows[count + 3 :][::-1]


def _looks(model: Any, layers: list[nn.Module], step: Step) -> tuple[Window, list[Window], Window]:
    inputs, labels_BT = _inputs(step)
    with torch.no_grad(), operators_of(step.device), TensorBytes() as counted:
        marks = _Marks(counted)
        hooks = [layers[0].register_forward_pre_hook(marks)]
        hooks += [layer.register_forward_hook(marks) for layer in layers]
        loss = _objective(model, inputs, labels_BT, step, cross_entropy)
        marks()
        del loss
        for hook in hooks:
            hook.remove()
    return marks.windows[0], marks.windows[1:-1], marks.windows[-1]


def _objective(model: Any, inputs: dict[str, Any], labels_BT: Tensor, step: Step, loss: LossFunction) -> Tensor:
    """What is minimised. Of pairs, whatever is made of their log-probabilities is a few numbers a pair."""
    if step.pairs:
        return log_probabilities_of(model, inputs, labels_BT, step.loss_chunk).sum()
    return loss_of(model, inputs, labels_BT, loss, step.loss_chunk).objective


def _inputs(step: Step) -> tuple[dict[str, Any], Tensor]:
    ids_BT = torch.zeros((step.rows, step.length), dtype=torch.long, device=META)
    inputs = {"input_ids": ids_BT}
    if step.masked:
        shape = (step.rows, 1, step.length, step.length)
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.bool, device=META)
        inputs["position_ids"] = ids_BT.clone()
    return inputs, ids_BT.clone()
