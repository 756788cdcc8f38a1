"""The memory of a step under DeepSpeed's ZeRO-2 and ZeRO-3, for ``memory_plan.py``.

By its code (``deepspeed/runtime/zero/stage_1_and_2.py``, ``stage3.py``) with the settings of ``zero.py``. At both
stages the float32 weights that are updated, their moments and the gradients are in one flat piece a rank; gradients
pass through a bucket of width squared numbers. Stage 2 has all weights whole. Stage 3 cuts them flat, too, but for
small ones, and gathers those of a linear layer, not of a decoder layer, while it computes.
"""

from collections.abc import Iterable

from workloads.training.memory_plan import Walk
from workloads.training.step_trace import LayerTrace, Weight, Window


class ZeroWalk(Walk):
    """A step in which an engine gathers and reduces by buckets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage = self.step.zero_stage
        self.small = 10 * self.trace.width
        weights = [weight for group in self.groups for weight in group]
        numbers = sum(weight.numbers for weight in weights if weight.trained)
        largest = max((weight.numbers for weight in weights if weight.trained), default=0)
        self.at_rest = 4 * -(-numbers // self.world)
        bucket = self.trace.width**2
        self.bucket = 4 * min(bucket, numbers) * (2 if self.stage == 3 else 1)  # stage 3 fills one, reduces the other
        self.reducing = 4 * max(min(bucket, numbers), largest)

    def keep(self, weights: list[Weight]) -> None:
        """Whole at stage 2, flat pieces at stage 3."""
        for weight in weights:
            numbers = weight.numbers
            if self.stage == 3:
                numbers = -(-weight.numbers // self.world) + (weight.numbers if weight.numbers <= self.small else 0)
            self.now[weight.part] += numbers * weight.computed.itemsize
        if self.stage == 3:
            self.now["gradients"] = self.at_rest  # their piece is there all the time

    def optimizer_bytes(self) -> int:
        """Two moments, and the float32 weights where they are a copy."""
        copied = self.stage == 2 or self.step.computed.itemsize < 4
        return (3 if copied else 2) * self.at_rest

    def forward(self) -> None:
        """Of the last micro-batch."""
        if self.micro_batches > 1:
            self.now["gradients"] = self.at_rest
        taught = self.teach()
        self._pass("forward", [layer.forward for layer in self.trace.layers], self.trace.before, self.trace.loss)
        self.now["teacher"] -= taught

    def backward(self) -> None:
        """From the loss to the embeddings."""
        layers, trace = self.trace.layers, self.trace
        self.now["gradients"] = self.at_rest  # on the last rank, whose piece is made first
        self.now["reduced"] = self.bucket
        self._layer("loss", trace.head.peak, self._head())
        self.now["loss"] += trace.head.change - trace.head_made
        self.now["activations"] += self.now["loss"]
        self.now["loss"] = 0
        self._reduce_made()
        for index in reversed(range(len(layers))):
            layer = layers[index]
            made = self._made(layer.weights) + (0 if index else self._made(trace.root) - trace.head_made)
            self._layer("activations", layer.backward.peak, self._gathered(layer.weights), _undone(layer))
            self.now["activations"] += layer.backward.change - made
            self._reduce_made()
        self.now |= dict.fromkeys(("activations", "loss", "reduced", "gathered"), 0)

    def update(self) -> None:
        """AdamW over one flat piece: the root of its second moment, and on a CPU a quotient too."""
        self._see("update", self.now, optimizer=self.at_rest * (1 if self.step.device == "cuda" else 2))

    def look(self) -> None:
        """The held-out loss."""
        self.now["gradients"] = self.at_rest if self.stage == 3 else 0
        taught = self.teach()
        looked = [layer.looked for layer in self.trace.layers]
        self._pass("held-out loss", looked, self.trace.looked_before, self.trace.looked_loss)
        self.now["teacher"] -= taught

    def _pass(self, phase: str, windows: list[Window], before: Window, loss: Window) -> None:
        self.now["gathered"] = self._held_head()
        self._window(phase, before, gathered=self._gathered(self.trace.root))
        for layer, window in zip(self.trace.layers, windows, strict=True):
            self._window(phase, window, gathered=self._gathered(layer.weights), undone=_undone(layer))
        self._window("loss" if phase == "forward" else phase, loss, "loss", gathered=self._head())
        self.now["gathered"] = 0

    def _layer(self, part: str, peak: int, gathered: int, undone: int = 0) -> None:
        self._see("backward", self.now, **{part: peak}, gathered=gathered, undone=undone)

    def _reduce_made(self) -> None:
        self._see("backward", self.now, reduced=self.reducing)

    def _gathered(self, weights: Iterable[Weight]) -> int:
        """Bytes of the largest of ``weights``."""
        if self.stage == 2 or self.world == 1:
            return 0
        return max((w.numbers * w.computed.itemsize for w in weights if w.numbers > self.small), default=0)

    def _head(self) -> int:
        return self._gathered(self.trace.root)

    def _held_head(self) -> int:
        """A trained head stays gathered through the forward pass."""
        if self.stage == 2 or self.world == 1:
            return 0
        return max((w.numbers * w.computed.itemsize for w in self.trace.root if w.trained), default=0)


def _undone(layer: LayerTrace) -> int:
    return max((weight.undone for weight in layer.weights), default=0)
