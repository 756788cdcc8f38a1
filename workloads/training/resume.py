"""Going on with a training run that was cut short: what may differ, and what is taken over from it.

    workbench train sft runs/train-sft/20261121T120000/config.yaml resume=train-sft/20261121T120000

The run that goes on is a run of its own, with its own folder and environment; the old one is only read.
"""

import json
import os
import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from workbench.config import load
from workbench.errors import UserError
from workbench.files import read_record, write_atomic
from workbench.run_records import flatten
from workbench.runs import Run, resolve_run, run_id, state_of
from workbench.tracking import WANDB_IDENTITY, read_metrics
from workloads.training.checkpoint import best_of, complete, history_of, step_of
from workloads.training.config import DivergenceConfig, TrainingConfig
from workloads.training.divergence import runs_away
from workloads.training.samples import read_samples

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""

SAMPLES = "artifacts/samples.jsonl"

STREAM = "artifacts/stream.jsonl"
"""Where the windows of streamed rows begin."""


def check_resume(config: TrainingConfig) -> None:
    """Raise UserError where ``config.resume`` names a run that ``config`` cannot go on with."""
    if config.resume is None:
        return
    folder = resolve_run(config.resume)
    state, status = state_of(folder), read_record(folder / "status.json") or {}
    if state == "finished" or (state == "running" and status.get("host") == socket.gethostname()):
        raise UserError(f"{run_id(folder)} is {state}: only a run that was cut short can be resumed")
    found = complete(folder / CHECKPOINTS)
    if not found:
        raise UserError(f"{run_id(folder)} has no checkpoint to go on from: start again, without resume")
    if not sound(found, config.divergence):
        raise UserError(
            f"{run_id(folder)} has no checkpoint from before its loss ran away: start again, without resume, or give "
            "divergence=null to go on all the same"
        )
    old = load(type(config), folder / "config.yaml", visit_paths=False)
    if changed := changes(old, config):
        raise UserError(
            f"{run_id(folder)} was learning something else: {', '.join(changed)}; give these keys as they were, or "
            "start a new run, without resume"
        )


def changes(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """What ``new`` would learn otherwise than ``old``, in words."""
    was, now = (flatten(config.model_dump(mode="json")) for config in (old, new))
    was["dtype"], now["dtype"] = old.compute_dtype, new.compute_dtype
    free = old.free - {"dtype"}
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key) and key.partition(".")[0] not in free]
    return [f"{key} was {was.get(key)}, not {now.get(key)}" for key in keys]


def sound(found: Sequence[Path], rule: DivergenceConfig | None) -> list[Path]:
    """Those of the checkpoints ``found`` whose loss is none that ``rule`` takes for the beginning of a divergence."""
    return [path for path in found if not runs_away(history_of(path).recent, rule)]


def adopt(reference: str, run: Run, rule: DivergenceConfig | None) -> int:
    """Take over the newest and the best ``sound`` checkpoint, metrics and samples of the run ``reference``; returns the
    step of the newest.

    Raises UserError where an input of that run has changed since.
    """
    folder = resolve_run(reference)
    was, now = (read_record(each / "inputs.json") or {} for each in (folder, run.folder))
    for name, described in now.items():
        if name in was and was[name].get("sha256") != described.get("sha256"):
            raise UserError(f"the input '{name}' of {run_id(folder)} has changed since: start again, without resume")
    found = sound(complete(folder / CHECKPOINTS), rule)
    newest, best = found[-1], best_of(found)
    for checkpoint in {newest, best or newest}:
        copy_checkpoint(checkpoint, run.folder / CHECKPOINTS / checkpoint.name)
    if (folder / "tensorboard").is_dir():
        shutil.copytree(folder / "tensorboard", run.folder / "tensorboard", dirs_exist_ok=True)
    for name in ("metrics.jsonl", SAMPLES, STREAM, WANDB_IDENTITY):
        if (folder / name).is_file():
            (run.folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(folder / name, run.folder / name)
    step = step_of(newest)
    forget_after(step, run.folder)
    run.input("resume", run=run_id(folder), step=step)
    return step


def copy_checkpoint(checkpoint: Path, target: Path) -> None:
    """A checkpoint of the same bytes on the disk, which are never written again; a copy where links cannot be had."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:
            shutil.copy2(source, copy)

    partial = target.with_name(f".{target.name}.partial")
    shutil.copytree(checkpoint, partial, copy_function=link)
    partial.rename(target)


def forget_after(step: int, folder: Path) -> None:
    """Drop what the run in ``folder`` measured and sampled after ``step``."""
    for name, rows in (
        ("metrics.jsonl", [row for row in read_metrics(folder) if row["step"] <= step]),
        (SAMPLES, read_samples(folder / SAMPLES, step)),
    ):
        if (folder / name).is_file():
            write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def what_is_left(run: Run, before: int | None = None, rule: DivergenceConfig | None = None) -> str:
    """A sentence on the last checkpoint of ``run`` (from ahead of step ``before``, and ``sound``) and on its best
    adapter."""
    there = complete(run.folder / CHECKPOINTS)
    found = sound([path for path in there if before is None or step_of(path) < before], rule)
    if not found:
        return f"there is no checkpoint; {run.folder / 'metrics.jsonl'} has its steps"
    told = f"the last {'good ' if before else ''}checkpoint is {found[-1]}"
    if before is None:
        config = shlex.quote(str(run.folder / "config.yaml"))
        told += f", go on from it with: workbench {run.command} {config} resume={run_id(run.folder)}"
    best = best_of(found)
    if best is not None and (best / "adapter").is_dir():
        loss = history_of(best).validation[-1][1]
        told += f"; the best adapter so far (held-out loss {loss:.3f}) is {best / 'adapter'}"
    return told
