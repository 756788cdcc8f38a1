"""Checkpoints by ``torch.distributed.checkpoint``: trainable weights, optimizer moments and the history, in shards.

    checkpoints = Checkpoints(run.folder / "checkpoints", keep_last=2)
    history = checkpoints.load(model, optimizer) or History()
    checkpoints.save(history, model, optimizer)     # training goes on while it is written

A checkpoint is a folder ``step-00000120``: it has its name only when every rank has written its part, so whatever is
killed, the folders that have one are whole. One made by any number of ranks loads on any other. Frozen weights are left
out: they come from the base. The folder must be on storage that all ranks share.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult

from workbench.errors import Failure
from workbench.files import read_json
from workbench.row_file import append_rows, read_rows
from workloads.training.history import History
from workloads.training.zero import AnyOptimizer, ZeroOptimizer, copy_of, give_back, is_zero

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)

FAILURES = "failures.jsonl"
"""Beside the checkpoints: the steps whose checkpoint could not be written, and why."""

Export = Callable[[Path], None]
"""Writes the weights, as they were when it was made, in another format into a folder."""


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*"))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is from."""
    return int(checkpoint.name.removeprefix("step-"))


def history_of(checkpoint: Path) -> History:
    """What the run had been through at ``checkpoint``."""
    return History.from_json(read_json(checkpoint / "history.json"))


def best_of(found: Sequence[Path]) -> Path | None:
    """Of the checkpoints ``found``, oldest first, that of the lowest held-out loss; None where no step of theirs has
    one."""
    losses = dict(history_of(found[-1]).validation) if found else {}
    looked_at = [path for path in found if step_of(path) in losses]
    return min(looked_at, key=lambda path: losses[step_of(path)], default=None)


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """The step and cause of each checkpoint that could not be written to ``folder``; of those whose line a full disk
    has cut off, nothing."""
    return read_rows(folder / FAILURES)


class Checkpoints:
    """The checkpoints of one training run. Every rank makes one and calls its methods in the same order."""

    def __init__(self, folder: Path, keep_last: int, in_doubt: int = 0) -> None:
        """The newest ``keep_last`` are kept, the best, and the newest from before the last ``in_doubt`` steps, whose
        loss may yet be found to have run away, with the one that will take its place.

        Raises Failure, on the rank that does not see it, where ``folder`` is not on shared storage."""
        self.folder, self._keep_last, self._in_doubt = folder, keep_last, in_doubt
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # training has its own
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._settled: threading.Event | None = None  # of the checkpoint that is being written
        if self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*.partial"):  # by ranks that were killed
                shutil.rmtree(left, ignore_errors=True)
        if self._group is not None:
            dist.barrier(self._group)
        if not folder.is_dir():
            raise Failure(
                f"{folder} is not on storage that all workers share: give WORKBENCH_RUNS_ROOT a shared folder"
            )

    def save(self, history: History, model: nn.Module, optimizer: AnyOptimizer, export: Export | None = None) -> None:
        """Copy this rank's shards to the CPU, then write them in the background. ``export`` writes ``adapter/``.

        Waits for the checkpoint before, if that is still being written. One that cannot be written, on a full disk for
        instance, is told on stderr and in ``failures.jsonl``: those before it stay, and training goes on.
        """
        self.wait()
        weights, moments = get_state_dict(*self._of_torch(model, optimizer), options=OPTIONS)
        partial = self.folder / f".{_name(history.step)}.partial"
        commit = _Commit(partial, self.folder, history, self._keep_last, self._in_doubt, export)
        future: Any = dcp.async_save(
            {"model": weights, "optimizer": moments},
            storage_writer=commit,
            process_group=self._group,
            no_dist=self._group is None,
        )
        step, settled = history.step, threading.Event()

        def settle(done: Future[Any]) -> None:
            try:
                self._clear(step, partial, done.exception())
            finally:
                settled.set()

        future.add_done_callback(settle)
        self._settled = settled

    def wait(self) -> None:
        """Until no checkpoint is being written."""
        if self._settled is not None:
            self._settled.wait()

    def load(self, model: nn.Module, optimizer: AnyOptimizer) -> History | None:
        """Load the newest checkpoint into ``model`` and ``optimizer``; returns its history, None if there is none."""
        found = complete(self.folder)
        if not found:
            return None
        targets = self._of_torch(model, optimizer)
        weights, moments = get_state_dict(*targets, options=OPTIONS)
        state = {"model": weights, "optimizer": moments}
        self._read(found[-1], state)
        set_state_dict(
            *targets, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=OPTIONS
        )  # fmt: skip
        if isinstance(optimizer, ZeroOptimizer):
            optimizer.take(*targets)
        return history_of(found[-1])

    def load_best(self, model: nn.Module) -> tuple[int, float] | None:
        """Load the weights of the lowest held-out loss that a checkpoint has into ``model``.

        Returns their step and loss, None where no checkpoint has one. It is not the best of the run where the
        checkpoint of that step could not be written.
        """
        self.wait()
        best = best_of(complete(self.folder))
        if best is None:
            return None
        target = copy_of(model, self._group) if self._group is not None and is_zero(model) else model
        state = {"model": get_model_state_dict(target, options=OPTIONS)}
        self._read(best, state)
        set_model_state_dict(target, state["model"], options=OPTIONS)
        if target is not model:
            give_back(target, model)
        return history_of(best).validation[-1]

    def _of_torch(self, model: nn.Module, optimizer: AnyOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What has the state in the form of PyTorch: these two, or copies of what DeepSpeed has."""
        if not isinstance(optimizer, ZeroOptimizer):
            return model, optimizer
        assert self._group is not None
        return optimizer.copies(self._group)

    def _read(self, checkpoint: Path, state: dict[str, Any]) -> None:
        dcp.load(state, checkpoint_id=str(checkpoint), process_group=self._group, no_dist=self._group is None)

    def _clear(self, step: int, partial: Path, error: BaseException | None) -> None:
        """Give back the space of a checkpoint that was not written whole, at once."""
        if error is None or self._rank:
            return
        shutil.rmtree(partial, ignore_errors=True)
        cause = _first_line(error)
        print(f"the checkpoint of step {step} could not be written: {cause}", file=sys.stderr, flush=True)
        with suppress(OSError):
            append_rows(self.folder / FAILURES, [{"step": step, "cause": cause}])


class _Commit(dcp.FileSystemWriter):
    """Writes a checkpoint under another name and, when all ranks have written, gives it its own."""

    def __init__(
        self, partial: Path, folder: Path, history: History, keep_last: int, in_doubt: int, export: Export | None
    ) -> None:
        super().__init__(partial)
        self._partial, self._folder, self._export = partial, folder, export
        self._keep_last, self._in_doubt = keep_last, in_doubt
        self._step, self._history = history.step, json.dumps(history.to_json())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 alone, after every rank's part."""
        super().finish(metadata, results)
        (self._partial / "history.json").write_text(self._history)
        if self._export is not None:
            self._export(self._partial / "adapter")
        self._partial.rename(self._folder / _name(self._step))
        with suppress(OSError):  # what is left is removed by the next
            self._remove_old()

    def _remove_old(self) -> None:
        found = complete(self._folder)
        settled = [path for path in found if step_of(path) <= self._step - self._in_doubt]
        next_settled = found[len(settled) : len(settled) + 1]  # without it the settled one would never be a newer one
        kept = {*found[-self._keep_last :], *settled[-1:], *next_settled, best_of(found)}
        for path in found:
            if path not in kept:
                gone = path.with_name(f".{path.name}.partial")  # half of a checkpoint must not have its name
                path.rename(gone)
                shutil.rmtree(gone)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _first_line(error: BaseException) -> str:
    causes = list((getattr(error, "failures", None) or {}).items())  # of a CheckpointException: by rank
    text = f"rank {causes[0][0]}: {causes[0][1][0]!r}" if causes else repr(error)
    return text.splitlines()[0]
