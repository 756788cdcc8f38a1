"""Short fine-tunings in which tests kill processes: thirty steps of QLoRA on two workers, and what is left of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_equality import make_base, make_texts

import workloads.sft
from workbench.config import load
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics

STEPS, EVERY = 30, 4

KEYS = [
    f"steps={STEPS}", "batch_size=4", "max_length=64", "warmup_steps=2", "log_every=1", f"checkpoint_every={EVERY}",
    "validate_every=10", "validation_rows=4", "cpus_per_worker=0.5", "adapter.rank=4",
    "keep_last=1",
]  # fmt: skip

Weights = dict[str, torch.Tensor]


@contextmanager
def training_root(folder: Path) -> Iterator[Path]:
    """A runs root in ``folder``, with a base and rows beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder / "runs"))
        make_base(folder / "base")
        rows = [{"instruction": asked, "output": answer} for asked, answer in make_texts(80)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def keys(root: Path, *more: str) -> list[str]:
    return [f"base={root / 'base'}", f"data=[{root / 'rows.jsonl'}]", *KEYS, *more]


def sft(root: Path, name: str, *more: str) -> tuple[Path, dict[str, Any]]:
    """Fine-tune as the command line does; the run's folder and summary."""
    config = load(workloads.sft.SftConfig, None, keys(root, *more))
    workloads.sft.check(config)
    with open_run("train", "sft", config, name=name) as run:
        summary = workloads.sft.run(config, run)
        finish(run, summary)
        return run.folder, summary


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder)]


def adapter(folder: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(folder / "artifacts" / "adapter" / "adapter_model.safetensors")


def folder_of(root: Path, name: str) -> Path | None:
    return next(iter((root / "runs" / "train-sft").glob(f"*-{name}")), None)
