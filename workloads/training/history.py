"""What a run has been through: its step and losses, and what follows from them. It travels with every checkpoint."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from workloads.training.config import EarlyStoppingConfig

Curve = list[tuple[int, float]]


@dataclass
class History:
    """``step`` steps are done. ``train`` and ``validation`` are (step, loss): mean cross-entropy in nats per target
    token, whatever else is minimised, or an objective's own. ``recent`` has the loss of each of the last steps, and
    ``recent_figures`` what else was watched."""

    step: int = 0
    train: Curve = field(default_factory=list)
    validation: Curve = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    recent_figures: list[list[float]] = field(default_factory=list)
    stopped_early: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "History":
        """What ``to_json`` gave."""
        curves = {name: [(int(step), float(loss)) for step, loss in values[name]] for name in ("train", "validation")}
        return cls(**{**values, **curves})

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; a loss that is no finite number is never in them."""
        return asdict(self)

    def log(self) -> list[float]:
        """The mean loss of the steps since the last of ``train``, where it is added, and the means of the figures."""
        logged = self.train[-1][0] if self.train else 0
        steps = slice(logged - self.step, None)
        loss = statistics.fmean(self.recent[steps])
        self.train.append((self.step, loss))
        return [loss, *map(statistics.fmean, zip(*self.recent_figures[steps], strict=True))]

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest held-out loss and that loss; of equal ones the first."""
        return min(self.validation, key=lambda point: point[1], default=None)

    @property
    def is_best(self) -> bool:
        """Whether the step that was just validated is the best so far."""
        return bool(self.validation) and self.best == self.validation[-1]

    def is_out_of_patience(self, rule: EarlyStoppingConfig) -> bool:
        """Whether the held-out loss has not fallen by more than ``min_delta`` in ``patience`` looks at it."""
        lowest, waited = math.inf, 0
        for _, loss in self.validation:
            if loss < lowest - rule.min_delta:
                lowest, waited = loss, 0
            else:
                waited += 1
        return waited >= rule.patience
