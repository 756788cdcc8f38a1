"""The memory that one rank of a training run will need, estimated before anything is loaded.

    plan = plan_memory(make, step, ranks=2, micro_batches=1)
    plan.peak, plan.phase, plan.parts

A step is walked layer by layer with what ``step_trace.py`` found each layer to keep, make and free, over what is there
all the time (shards, moments). FSDP2 adds, by its code (``torch/distributed/fsdp/_fully_shard``): the gathered layer
that computes, the buffer in which itself (forward) or the next one (backward) arrives, the root, which stays gathered
from the forward pass to the end of the backward pass, and the float32 buffer in which a layer's gradients are reduced.
Shards are padded to equally many rows, so that every rank holds as much as the first: the smallest card must hold it.
Shards that are offloaded are in the host's memory, and on the card while they are copied to be gathered. A teacher's
forward pass surrounds the student's: ``distillation.py``. DeepSpeed's strategies are walked by ``zero_plan.py``.

What is counted is bytes of tensors. A card needs more: ``CONTEXT`` and ``FRAGMENTATION`` are assumptions, not measured.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workloads.training.chunked_loss import LossFunction, cross_entropy
from workloads.training.config import DistillConfig
from workloads.training.distillation import divergence
from workloads.training.step_trace import Step, Trace, Weight, Window, trace_step

CONTEXT = 1 << 30
"""Bytes of a card that no tensor gets: CUDA's context, loaded kernels, the workspace of cuBLAS and NCCL. Assumed."""

FRAGMENTATION = 0.05
"""What the caching allocator holds beyond the tensors' peak, as a share of it. Assumed."""

Part = Literal[
    "weights", "scales", "adapter", "teacher", "optimizer", "gradients", "activations", "loss", "gathered", "reduced",
    "undone",
]  # fmt: skip
PARTS: dict[Part, str] = {
    "weights": "weights of the base",
    "scales": "scales of 4-bit weights",
    "adapter": "adapter",
    "teacher": "the teacher: its shards, what it has gathered, its hidden states",
    "optimizer": "AdamW's moments and working copy",
    "gradients": "gradients",
    "activations": "activations",
    "loss": "loss: logits of a chunk and gradients",
    "gathered": "weights gathered from other ranks",
    "reduced": "gradients on their way to other ranks",
    "undone": "4-bit weight, undone",
}


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate. ``phases`` are the peaks of each phase in bytes, ``parts`` what the highest is made of; ``host`` are
    bytes that each rank keeps in its host's memory, not on its card."""

    ranks: int
    phases: dict[str, int]
    parts: dict[Part, int]
    parameters: int
    trained: int
    host: int = 0

    @property
    def phase(self) -> str:
        """When the most is needed."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def peak(self) -> int:
        """Bytes of tensors on each rank at the worst moment."""
        return self.phases[self.phase]

    @property
    def card(self) -> int:
        """Bytes that the smallest card should have: tensors and what is assumed beside them."""
        return int(self.peak * (1 + FRAGMENTATION)) + CONTEXT


def plan_memory(
    make: Callable[[], Any], step: Step, *, ranks: int, micro_batches: int, teacher: Callable[[], Any] | None = None
) -> MemoryPlan:
    """The plan of a run that takes ``micro_batches`` times ``step`` on each rank ahead of an update.

    ``make`` makes the model, ``teacher`` another that it learns from; they are called on the meta device.
    """
    from workloads.training.zero_plan import ZeroWalk

    trace = trace_step(make, step)
    taught = None
    if teacher is not None:
        plain = replace(step, adapter=None, quantized=False, checkpointing=False, stored=step.computed, pairs=False)
        taught = trace_step(teacher, replace(plain, loss=cross_entropy))
    walk = (ZeroWalk if step.zero_stage else Walk)(trace, step, ranks, micro_batches, taught)
    walk.load()
    walk.forward()
    walk.backward()
    walk.update()
    walk.look()
    weights = [weight for group in (trace.root, *(layer.weights for layer in trace.layers)) for weight in group]
    best = max(walk.seen, key=lambda phase: sum(walk.seen[phase].values()))
    return MemoryPlan(
        ranks,
        {phase: sum(parts.values()) for phase, parts in walk.seen.items()},
        {part: walk.seen[best][part] for part in PARTS if walk.seen[best].get(part)},
        sum(weight.parameters for weight in weights),
        sum(weight.parameters for weight in weights if weight.trained),
        walk.host,
    )


def mixture(distill: DistillConfig) -> LossFunction:
    """The loss with a teacher, as far as memory goes: the teacher's logits are as many as the model's own."""

    def mixed(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
        soft = divergence(logits_CV, torch.empty_like(logits_CV), distill.temperature, distill.top_k)
        return cross_entropy(logits_CV, labels_C) + soft

    return mixed


@dataclass
class Walk:
    """Goes through a step; ``seen`` has, for each phase, the parts of its highest moment."""

    trace: Trace
    step: Step
    ranks: int
    micro_batches: int
    teacher: Trace | None = None
    seen: dict[str, dict[Part, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trace, world = self.trace, self.ranks if self.step.sharded else 1
        self.world = world
        self.groups = [trace.root, *(layer.weights for layer in trace.layers)]
        self.now: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self.at_rest = sum(map(self._stored_gradients, self.groups))
        self.offloaded, self.host = self.step.offloaded and self.step.device == "cuda", 0

    def load(self) -> None:
        """In pieces one layer at a time is whole on a rank, and last what is in no layer; otherwise the base and a new
        adapter are whole on every rank until they are sharded."""
        weights = [weight for group in self.groups for weight in group]
        parts = [*(layer.weights for layer in self.trace.layers), self.trace.root] if self.step.pieces else [weights]
        for part in parts:
            whole = dict(self.now)
            for weight in part:
                whole[weight.part] += weight.bytes
            packed = [weight.parameters for weight in part if weight.parameters > weight.numbers]
            if not self.offloaded:  # which loads on the host
                undone = max(packed, default=0) * self.step.computed.itemsize  # quantised one by one
                self._see("loading", whole, undone=undone)
            self.keep(part)
        self._load_teacher()
        if self.offloaded:
            self.host = sum(self.now.values()) - self.now["teacher"] + 3 * self.at_rest
            self.now |= dict.fromkeys(("weights", "scales", "adapter"), 0)
            self.at_rest = 0
        self.now["optimizer"] = self.optimizer_bytes()

    def keep(self, weights: list[Weight]) -> None:
        """What a rank has of ``weights`` once they are sharded."""
        for weight in weights:
            self.now[weight.part] += weight.shard(self.world) * weight.stored.itemsize

    def optimizer_bytes(self) -> int:
        """AdamW's state: two moments."""
        return 2 * self.at_rest

    def _load_teacher(self) -> None:
        if self.teacher is None:
            return
        weights = [w for group in (self.teacher.root, *(t.weights for t in self.teacher.layers)) for w in group]
        self._see("loading the teacher", self.now, teacher=sum(weight.bytes for weight in weights))
        self.now["teacher"] = sum(weight.shard(self.world) * weight.stored.itemsize for weight in weights)

    def teach(self) -> int:
        """The teacher's forward pass; returns the bytes that are its own until the student's loss is taken."""
        if self.teacher is None:
            return 0
        held = self._whole(self.teacher.root)
        self._see("teacher", self.now, teacher=held + self.teacher.looked_before.peak)
        held += self.teacher.looked_before.change
        for layer in self.teacher.layers:
            gathered = self._whole(layer.weights) * (2 if self.world > 1 else 1)
            self._see("teacher", self.now, teacher=held + layer.looked.peak + gathered)
            held += layer.looked.change
        self.now["teacher"] += held
        return held

    def forward(self) -> None:
        """Of the last micro-batch: those before it have left gradients, which sharding keeps whole and in float32."""
        if self.micro_batches > 1:
            self.now["gradients"] = sum(map(self._accumulated, self.groups))
        taught = self.teach()
        root = self._gathered(self.trace.root)
        first = self._gathered(self.trace.layers[0].weights)
        self.now["gathered"] += root
        self._window("forward", self.trace.before, gathered=root + first if self.world > 1 else 0)
        for layer in self.trace.layers:
            size = self._gathered(layer.weights)
            undone = max((weight.undone for weight in layer.weights), default=0)
            self._window("forward", layer.forward, gathered=size + self._arriving(layer.weights), undone=undone)
        self._window("loss", self.trace.loss, "loss")
        self.now["teacher"] -= taught

    def backward(self) -> None:
        """From the loss to the embeddings; gradients of sharded weights are reduced layer by layer."""
        layers = self.trace.layers
        last = self._gathered(layers[-1].weights) if self.world > 1 else 0
        self._backward_window("loss", self.trace.head, self.trace.head_made, last, 0)
        self.now["activations"] += self.now["loss"]  # what is left of it: the gradient by the last layer's output
        self.now["loss"] = reduced = 0
        for index in reversed(range(len(layers))):
            layer = layers[index]
            ahead = self._arriving(layers[index - 1].weights) if index else 0
            undone = max((weight.undone for weight in layer.weights), default=0)
            made = self._made(layer.weights) + (0 if index else self._made(self.trace.root) - self.trace.head_made)
            self.now["reduced"] = reduced
            gathered = self._gathered(layer.weights) + ahead
            self._backward_window("activations", layer.backward, made, gathered, undone)
            reduced = self._reduce(layer.weights, ahead)
        self.now["reduced"] = reduced
        self._reduce(self.trace.root, 0)
        self.now["activations"] = self.now["loss"] = self.now["reduced"] = self.now["gathered"] = 0
        self.now["gradients"] = self.at_rest

    def update(self) -> None:
        """AdamW makes the root of the second moment: of all weights at once on a card, one by one on a CPU."""
        if self.step.device == "cuda":
            working = self.at_rest
        else:
            sizes = (w.shard(self.world) * w.stored.itemsize for group in self.groups for w in group if w.trained)
            working = 2 * max(sizes, default=0)
        self._see("update", self.now, optimizer=working)

    def look(self) -> None:
        """The held-out loss: no gradients, but the whole share of a batch at once."""
        self.now["gradients"] = 0
        taught = self.teach()
        root = self._gathered(self.trace.root)
        self.now["gathered"] = root
        self._window("held-out loss", self.trace.looked_before)
        for layer in self.trace.layers:
            size = self._gathered(layer.weights)
            undone = max((weight.undone for weight in layer.weights), default=0)
            self._window("held-out loss", layer.looked, gathered=size + self._arriving(layer.weights), undone=undone)
        self._window("held-out loss", self.trace.looked_loss, "loss")
        self.now["teacher"] -= taught

    def _backward_window(self, part: Part, window: Window, made: int, gathered: int, undone: int) -> None:
        """``made`` are bytes of gradients, which autograd leaves alive; of a later micro-batch, it adds them up."""
        self._see("backward", self.now, **{part: window.peak - made}, gradients=made, gathered=gathered, undone=undone)
        self.now[part] += window.change - made
        if self.micro_batches == 1:
            self.now["gradients"] += made

    def _reduce(self, weights: list[Weight], gathered: int) -> int:
        """Put the gradients of ``weights`` into one buffer in float32 and keep this rank's shard of the sum."""
        if not self.step.sharded:
            return 0
        padded = sum(weight.shard(self.world) for weight in weights if weight.trained)
        buffer, shard = 4 * padded * self.world, 4 * padded
        self.now["reduced"] = 0
        self._see("backward", self.now, reduced=buffer + shard, gathered=gathered)
        made = self._accumulated(weights) if self.micro_batches > 1 else self._made(weights)
        self.now["gradients"] += (0 if self.offloaded else self._stored_gradients(weights)) - made
        return buffer

    def _window(self, phase: str, window: Window, part: Part = "activations", **more: int) -> None:
        self._see(phase, self.now, **{part: window.peak}, **more)
        self.now[part] += window.change

    def _see(self, phase: str, base: dict[Part, int], **more: int) -> None:
        moment: dict[Any, int] = {part: base[part] + more.get(part, 0) for part in PARTS}
        if sum(moment.values()) > sum(self.seen.get(phase, {}).values()):
            self.seen[phase] = moment

    def _gathered(self, weights: Iterable[Weight]) -> int:
        """Bytes of ``weights`` when they are whole on a rank, in the dtype of the computation."""
        return self._whole(weights)

    def _whole(self, weights: Iterable[Weight]) -> int:
        if not self.step.sharded:
            return 0
        return sum(weight.shard(self.world) * self.world * weight.computed.itemsize for weight in weights)

    def _arriving(self, weights: Iterable[Weight]) -> int:
        """Bytes of the buffer that the next ``weights`` are gathered in, and of the shards that come from the host."""
        size = self._gathered(weights) if self.world > 1 else 0
        return size + (size // self.world if self.offloaded else 0)

    def _made(self, weights: Iterable[Weight]) -> int:
        """Bytes of the gradients as autograd makes them."""
        return sum(weight.numbers * weight.computed.itemsize for weight in weights if weight.trained)

    def _accumulated(self, weights: Iterable[Weight]) -> int:
        """Bytes of the gradients between two micro-batches."""
        if self.step.sharded:
            return sum(weight.numbers * 4 for weight in weights if weight.trained)
        return self._made(weights)

    def _stored_gradients(self, weights: Iterable[Weight]) -> int:
        """Bytes of the gradients that the optimizer reads; each moment has as many."""
        return sum(weight.shard(self.world) * weight.stored.itemsize for weight in weights if weight.trained)
