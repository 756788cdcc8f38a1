"""Every step's loss and gradient norm are looked at, and training that went wrong is stopped while it can be mended.

On a CPU that costs nothing. A card is not made to wait at every step: its losses stay there until somebody asks for
them, at the latest before a row of metrics or a checkpoint, and the error still names the step.
"""

import math
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import Failure
from workloads.training.batches import StepBatches
from workloads.training.config import DivergenceConfig
from workloads.training.history import History

SHOWN_SOURCES = 20

QUIET = 0.1
"""Nats: a loss that is usually lower is compared with this, for its noise is many times itself."""


def runs_away(losses: Sequence[float], rule: DivergenceConfig | None) -> bool:
    """Whether the last of ``losses`` is one for which training is stopped where it is followed by more of them."""
    if rule is None or len(losses) < 2:
        return False
    return losses[-1] > rule.factor * max(statistics.median(losses[:-1]), QUIET)


class Diverged(Failure):
    """Training that went wrong at step ``since``: what was seen, and the documents in that step's batch.

    Every rank raises it at the same step, and training again from a checkpoint would raise it again.
    """

    def __init__(self, reason: str, since: int, sources: tuple[str, ...]) -> None:
        super().__init__(reason, since, sources)
        self.reason, self.since, self.sources = reason, since, sources

    def __str__(self) -> str:
        documents = ", ".join(self.sources[:SHOWN_SOURCES]) or "rows without a name"
        more = f" and {len(self.sources) - SHOWN_SOURCES} more" if len(self.sources) > SHOWN_SOURCES else ""
        return f"{self.reason}; the batch of step {self.since}: {documents}{more}; lower learning_rate, or look at them"


class LossWatch:
    """Takes what is watched at each step (this rank's share of it, the loss first) and the gradient's norm, and fills
    ``history.recent`` and ``recent_figures``."""

    def __init__(
        self, history: History, rule: DivergenceConfig | None, batches: StepBatches, device: torch.device, remember: int
    ) -> None:
        self._history, self._rule, self._batches = history, rule, batches
        self._at_once = device.type == "cpu"
        self._remember = max(remember, rule.window + rule.steps if rule else 0)
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, share: Tensor, norm: Tensor) -> None:
        """Loss and figures (1 + F), and gradient norm, of the ``step``-th step, before the weights are changed by it.
        Raises Diverged."""
        self._unread.append((step, torch.hstack((share, norm.to(share)))))
        if self._at_once:
            self.look()

    def look(self) -> None:
        """Read the steps since the last look. Collective. Raises Diverged, on every rank."""
        if not self._unread:
            return
        seen = torch.stack([values for _, values in self._unread])
        if dist.is_initialized():
            dist.all_reduce(seen)
        steps = [step for step, _ in self._unread]
        self._unread.clear()
        for step, (loss, *figures, norm) in zip(steps, seen.tolist(), strict=True):
            self._judge(step, loss, norm)
            self._history.recent.append(loss)
            self._history.recent_figures.append(figures)
        del self._history.recent[: -self._remember], self._history.recent_figures[: -self._remember]
        self._compare(steps[-1])

    def look_at_held_out(self, step: int, loss: float) -> None:
        """The held-out loss after ``step``, which tells of the weights that this step made. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"the held-out loss is {loss} after step {step}", step, self._sources(step))

    def _judge(self, step: int, loss: float, norm: float) -> None:
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise Diverged(f"the {name} is {value} at step {step}", step, self._sources(step))

    def _compare(self, step: int) -> None:
        if self._rule is None:
            return
        before, last = self._history.recent[: -self._rule.steps], self._history.recent[-self._rule.steps :]
        if len(before) < self._rule.steps:
            return
        usual = max(statistics.median(before), QUIET)
        if min(last) > self._rule.factor * usual:
            since = step - self._rule.steps + 1
            raise Diverged(
                f"the loss has been over {self._rule.factor:g} times its usual {usual:.3g} since step {since}",
                since,
                self._sources(since),
            )

    def _sources(self, step: int) -> tuple[str, ...]:
        return self._batches.sources(step - 1)
