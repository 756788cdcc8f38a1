"""Sweeps of tiny models for tests: a base, rows and a space in a folder, and commands as the command line runs them.

sweep(root, "asha", "budget.trials=5")
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import found
from loss_equality import make_base, make_texts

import tune.sweep
from tune.config import SweepConfig
from tune.study import SweepStudy, TrialRecord
from workbench.config import load
from workbench.runs import finish, open_run, reopen_run
from workloads.training.checkpoint import complete, step_of

ACTORS = ("ray::_Inner", "ray::Peer")
"""What Ray calls the process of a Tune class with parameters, and those of a trial's other workers."""

KEYS = [
    "config.steps=40", "config.batch_size=4", "config.max_length=64", "config.warmup_steps=2",
    "config.validate_every=5", "config.validation_rows=4", "config.checkpoint_every=5",
    "config.cpus_per_worker=0.5", "config.adapter.rank=4", "config.keep_best=false", "scheduler.grace_steps=10",
    "scheduler.spare=0",
]  # fmt: skip


@contextmanager
def sweep_root(folder: Path) -> Iterator[Path]:
    """A runs root in ``folder``, with a base, rows and a space beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder / "runs"))
        make_base(folder / "base")
        rows = [{"instruction": asked, "output": answer} for asked, answer in make_texts(80)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "space.yaml").write_text(
            "space:\n  learning_rate: {loguniform: [0.0001, 0.03]}\n  adapter.rank: {choice: [2, 4]}\n"
        )
        yield folder


def overrides(root: Path, *more: str) -> list[str]:
    """What every sweep here has, and ``more``."""
    return [f"config.base={root / 'base'}", f"config.data=[{root / 'rows.jsonl'}]", *KEYS, *more]


def sweep(root: Path, name: str, *more: str) -> tuple[Path, dict[str, Any]]:
    """Run a sweep as the command line does; the run's folder and summary."""
    config = load(SweepConfig, root / "space.yaml", overrides(root, *more))
    tune.sweep.check(config)
    with open_run("tune", "run", config, name=name) as run:
        summary = tune.sweep.run(config, run)
        finish(run, summary)
        return run.folder, summary


def resume(folder: Path) -> dict[str, Any]:
    """Go on with the sweep in ``folder``; its summary."""
    config = load(SweepConfig, folder / "config.yaml", visit_paths=False)
    with reopen_run(folder, config) as run:
        summary = tune.sweep.resume(config, run)
        finish(run, summary)
        return summary


def trials_of(folder: Path) -> list[TrialRecord]:
    """The trials of its study."""
    return SweepStudy(folder, {"validation_loss": "min"}).trials()


def folder_of(root: Path, name: str) -> Path | None:
    """The folder of the sweep called ``name``, once it has a study."""
    folders = (root / "runs" / "tune-run").glob(f"*-{name}")
    return next((folder for folder in folders if (folder / "study.journal").exists()), None)


def actors() -> list[Any]:
    """The processes of trials that run on this process's Ray."""
    return [process for words in ACTORS for process in found(os.getpid(), words)]


def nothing_is_left() -> bool:
    """Whether no trial's process is left, no actor of one, and no placement group."""
    import ray
    from ray._private.state import actors as known  # the State API looks for a Ray by itself, and may find another

    kinds = tuple(name.removeprefix("ray::") for name in ACTORS)
    alive = [actor["ActorClassName"] for actor in known(actor_state_name="ALIVE").values()]
    groups = ray.util.placement_group_table().values()
    return (
        not actors()
        and not [name for name in alive if name.endswith(kinds)]
        and all(group["state"] == "REMOVED" for group in groups)
    )


def last_checkpoint(folder: Path, number: int) -> int:
    """The step of the newest checkpoint of a trial, 0 where it has none."""
    return max(map(step_of, complete(folder / "artifacts" / "trials" / str(number) / "checkpoints")), default=0)


def is_under_way(trials: list[TrialRecord], upto: int = 40) -> bool:
    """Whether one has finished and another is between its first looks and ``upto``."""
    return any(trial.state == "finished" for trial in trials) and any(
        trial.state == "running" and 5 < trial.steps < upto for trial in trials
    )
