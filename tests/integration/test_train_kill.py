"""Rank 0, another rank or the driver is killed at a random step: the adapter and the losses are those of an undisturbed
run. ``make soak`` repeats it ROUNDS times."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from kills import ROUNDS, dice, found, wait_until
from loss_equality import make_base, make_texts

import workloads.sft
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import finish, open_run, state_of
from workbench.tracking import read_metrics
from workloads.training.checkpoint import complete, step_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

STEPS, EVERY = 30, 4

KEYS = [
    f"steps={STEPS}", "batch_size=4", "max_length=64", "warmup_steps=2", "log_every=1", f"checkpoint_every={EVERY}",
    "validate_every=10", "validation_rows=4", "cpus_per_worker=0.5", "adapter.rank=4",
    "keep_last=1", "max_failures=1",
]  # fmt: skip

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs root, with a base and rows beside it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kills")
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


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> tuple[list[tuple[int, float]], Weights]:
    """QLoRA on two workers, left in peace."""
    folder, _ = sft(root, "undisturbed")
    assert [step for step, _ in curve(folder)] == list(range(1, STEPS + 1))
    return curve(folder), adapter(folder)


def folder_of(root: Path, name: str) -> Path | None:
    return next(iter((root / "runs" / "train-sft").glob(f"*-{name}")), None)


def ranks(folder: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The worker that writes the run's metrics, and the others."""
    workers = found(os.getpid(), "RayTrainWorker")
    metrics = str(folder / "metrics.jsonl")
    first = [worker for worker in workers if metrics in [file.path for file in worker.open_files()]]
    return first[0], [worker for worker in workers if worker not in first]


def kill_at(root: Path, name: str, step: int, choose: Callable[[Path], psutil.Process]) -> tuple[int, int]:
    """Kill the process that ``choose`` picks once ``step`` is logged: the step then, and that of the checkpoint."""
    wait_until(lambda: (folder := folder_of(root, name)) and read_metrics(folder), 240, "the first step")
    folder = folder_of(root, name)
    assert folder is not None
    victim = choose(folder)
    wait_until(lambda: read_metrics(folder)[-1]["step"] >= step, 240, f"step {step}")
    victim.kill()
    seen, kept = read_metrics(folder)[-1]["step"], complete(folder / "checkpoints")
    return seen, step_of(kept[-1]) if kept else 0


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("victim", ["rank 0", "another rank"])
def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    root: Path, undisturbed: tuple[list[tuple[int, float]], Weights], victim: str, number: int
) -> None:
    step, name = dice(victim, number).randrange(2, STEPS - 8), f"{victim.replace(' ', '-')}-{number}"
    killed: list[tuple[int, int]] = []

    def choose(folder: Path) -> psutil.Process:
        first, others = ranks(folder)
        return first if victim == "rank 0" else others[0]

    killer = threading.Thread(target=lambda: killed.append(kill_at(root, name, step, choose)), daemon=True)
    killer.start()
    folder, summary = sft(root, name)
    killer.join()
    ((seen, kept),) = killed
    print(f"killed at step {seen}, went on from {summary['resumed_from']}")
    assert kept <= summary["resumed_from"] <= seen
    assert seen - summary["resumed_from"] <= 2 * EVERY  # one more may have been on its way to the disk
    assert_undisturbed(folder, undisturbed)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_driver_leaves_a_run_that_another_command_finishes(
    root: Path, undisturbed: tuple[list[tuple[int, float]], Weights], number: int
) -> None:
    import ray

    step, name = dice("driver", number).randrange(EVERY + 1, STEPS - 8), f"driver-{number}"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(
        [sys.executable, "-m", "workbench", "train", "sft", *keys(root), "--name", name], env=environment
    )
    try:
        kill_at(root, name, step, lambda _: psutil.Process(driver.pid))
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not found(os.getpid(), "RayTrainWorker"), 60, "the end of the dead driver's workers")
    cut = folder_of(root, name)
    assert cut is not None
    assert state_of(cut) == "lost"

    with pytest.raises(UserError, match=r"something else: learning_rate was 0.001, not 0.5; give"):
        sft(root, "other", "learning_rate=0.5", f"resume={cut}")
    workers = 1 + number % 2
    folder, summary = sft(root, f"resumed-{number}", f"resume=train-sft/{cut.name}", f"workers={workers}")
    assert summary["resumed_from"] == step_of(complete(cut / "checkpoints")[-1])
    assert_undisturbed(folder, undisturbed, 0.0 if workers == 2 else 1e-5)  # one worker sums in another order
    with pytest.raises(UserError, match="finished: only a run that was cut short"):
        sft(root, "again", f"resume={folder}")


def assert_undisturbed(
    folder: Path, undisturbed: tuple[list[tuple[int, float]], Weights], tolerance: float = 0.0
) -> None:
    """Every step once, with its loss, and the adapter: to the last bit, or within ``tolerance``."""
    losses, weights = undisturbed
    assert [step for step, _ in curve(folder)] == list(range(1, STEPS + 1))
    assert [loss for _, loss in curve(folder)] == pytest.approx([loss for _, loss in losses], abs=tolerance, rel=0)
    mine = adapter(folder)
    assert mine.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(mine[name], weight, rtol=0, atol=tolerance), name
