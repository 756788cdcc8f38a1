"""What each process of a trial does: the workload's own loop, whose looks at the held-out loss may end it.

A trial of several workers is a process group of as many ranks. Rank 0 hands over the looks and hears whether the trial
goes on; all others hear it from rank 0 at the same step, so that all write their part of the last checkpoint.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn, optim

from tune.kept_base import KeptBase
from tune.space import at_point
from tune.workload import WORKLOADS
from workbench.config import adopt_environment
from workbench.tracking import Tracker, read_metrics
from workloads.training.config import TrainingConfig
from workloads.training.devices import check_cards, local_device
from workloads.training.history import History
from workloads.training.ray_train import WorkerEvents
from workloads.training.resume import forget_after

PARTIAL = ".result.partial"
"""The folder of a trial that its adapter or model is written to."""

REPORTED = "validation_loss"
"""A row with it is a look at the held-out rows: that is what a trial reports."""


class Ended(BaseException):
    """Raised in a trial's loop, after its checkpoint, when it is to end; no ``except Exception`` may keep it."""


class Listener(Protocol):
    """Who hears of rank 0's training."""

    def report(self, result: dict[str, Any]) -> bool:
        """A look; whether the trial goes on."""

    def is_ready(self) -> None:
        """There is a model, and training begins."""


class TrialEvents(WorkerEvents):
    """The loop's events on one rank of a trial; rank 0 alone has a listener."""

    def __init__(self, folder: Path, config: TrainingConfig, rank: int, listener: Listener | None) -> None:
        super().__init__(folder, rank, config)
        self._config, self._listener = config, listener
        self.kept: dict[str, Any] = {}
        """The look at the weights that are the result, where they are not the last ones."""
        self._word = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def resume(self, model: nn.Module, optimizer: optim.Optimizer) -> History:
        """Go on from the trial's last checkpoint, where it has one, which may be a copy of another trial's; one of the
        last step is reported again. W&B is told only where it has a key. Raises Ended as ``log`` does."""
        history = self._checkpoints.load(model, optimizer) or History()
        for group in optimizer.param_groups:
            group["weight_decay"] = self._config.weight_decay
        self._state = history, model, optimizer
        if self._listener is not None:
            forget_after(history.step, self.folder)
            self._tracker = Tracker(self.folder, first_step=history.step + 1, offline=False)
            self._listener.is_ready()
        no_step_left = history.step >= self._config.steps or history.stopped_early
        if no_step_left and history.validation and not self._goes_on(self._look_at(*history.validation[-1])):
            raise Ended
        return history

    def load_best(self, model: nn.Module) -> None:
        """Load the weights of the lowest held-out loss, whose look is ``kept``."""
        super().load_best(model)
        if self.loaded is not None:
            self.kept = self._look_at(*self.loaded)

    def log(self, step: int, **values: float) -> None:
        """Append to the trial's metrics; report a look. Raises Ended, on every rank, if the trial is to end."""
        super().log(step, **values)
        if REPORTED not in values or self._goes_on({"step": step, **values}):
            return
        self.checkpoint(*self._state)
        self._checkpoints.wait()
        raise Ended

    def _look_at(self, step: int, loss: float) -> dict[str, Any]:
        """What was measured at ``step``; of a step before a copied checkpoint the held-out ``loss`` alone is known."""
        rows = [row for row in read_metrics(self.folder) if row["step"] == step and REPORTED in row]
        known = {key: value for row in rows[-1:] for key, value in row.items() if key != "time" and value is not None}
        return {"step": step, REPORTED: loss, **known}

    def _goes_on(self, look: dict[str, Any]) -> bool:
        word = [self._listener is None or self._listener.report(look)]
        if self._word is not None:
            dist.broadcast_object_list(word, src=0, group=self._word)
        return word[0]


def train_part(
    shared: dict[str, Any],
    trial: dict[str, Any],
    base: KeptBase,
    listener: Listener | None,
    rank: int = 0,
    local_rank: int = 0,
) -> dict[str, Any]:
    """Train ``trial``'s point as ``rank`` of the default process group, or alone where there is none; its facts.

    The result is in ``PARTIAL`` of its folder; where it is not the last weights, ``kept`` has the look at them. Raises
    UserError where this rank's card is too small, and Ended.
    """
    config = at_point(shared["config"], trial["point"])
    device = local_device(config, local_rank)
    check_cards(trial["needed"], device, min(1.0, trial["gpus"] or 1.0))
    folder = Path(shared["folder"]) / str(trial["number"])
    events = TrialEvents(folder, config, rank, listener)
    with events:
        facts = WORKLOADS[shared["workload"]].train(
            config, shared["payload"], events, folder / PARTIAL, base, device, rank
        )
    return {**facts, "kept": events.kept} if events.kept else facts


def take_environment(trial: dict[str, Any]) -> None:
    """Tune gives its trials no runtime environment: which cards this process may see it is told here."""
    adopt_environment(trial["environment"])


def is_there(folder: Path, name: str) -> bool:
    """Whether ``folder`` has ``name``, by a listing, which is never an old one on NFS."""
    return name in os.listdir(folder)
