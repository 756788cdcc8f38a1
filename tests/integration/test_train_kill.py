"""Rank 0, another rank or the driver is killed at a random step: the adapter and the losses are those of an undisturbed
run. ``make soak`` repeats it ROUNDS times."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from kills import ROUNDS, dice, found, wait_until
from training_runs import EVERY, STEPS, Weights, adapter, curve, folder_of, keys, sft, training_root

from workbench.errors import UserError
from workbench.runs import state_of
from workbench.tracking import read_metrics
from workloads.training.checkpoint import complete, step_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with training_root(tmp_path_factory.mktemp("kills")) as folder:
        yield folder


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> tuple[list[tuple[int, float]], Weights]:
    """QLoRA on two workers, left in peace."""
    folder, _ = sft(root, "undisturbed")
    assert [step for step, _ in curve(folder)] == list(range(1, STEPS + 1))
    return curve(folder), adapter(folder)


def ranks(folder: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The worker that writes the run's metrics, and the others."""
    workers = found(os.getpid(), "RayTrainWorker")
    events = f"{folder}/"  # TensorBoard's file stays open
    first = [
        worker
        for worker in workers
        if any(file.path.startswith(events) and "tfevents" in file.path for file in worker.open_files())
    ]
    return first[0], [worker for worker in workers if worker not in first]


def kill_at(root: Path, name: str, step: int, choose: Callable[[Path], psutil.Process]) -> tuple[int, int]:
    """Kill the process that ``choose`` picks once ``step`` is logged: the step then, and that of the checkpoint."""
    wait_until(lambda: (folder := folder_of(root, name)) and read_metrics(folder), 240, "the first step")
    folder = folder_of(root, name)
    assert folder is not None
    # none for a moment where a run begins again before its first checkpoint
    wait_until(lambda: (rows := read_metrics(folder)) and rows[-1]["step"] >= step, 240, f"step {step}")
    choose(folder).kill()
    seen, kept = read_metrics(folder)[-1]["step"], complete(folder / "checkpoints")
    return seen, step_of(kept[-1]) if kept else 0


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_workers_cost_only_the_steps_since_the_last_checkpoint(
    root: Path, undisturbed: tuple[list[tuple[int, float]], Weights], number: int
) -> None:
    """Rank 0 is killed and later another rank, or the other way round."""
    chance, name = dice("workers", number), f"workers-{number}"
    steps = chance.randrange(2, STEPS // 2 - 4), chance.randrange(STEPS // 2 + 2, STEPS - 8)
    victims = chance.sample(["rank 0", "another rank"], 2)
    killed: list[tuple[int, int]] = []

    def kill() -> None:
        for step, victim in zip(steps, victims, strict=True):
            killed.append(kill_at(root, name, step, partial(chosen, victim=victim)))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    folder, summary = sft(root, name)
    killer.join(timeout=300)
    (_, first_kept), (seen, kept) = killed
    print(f"killed {victims} at steps {steps}: seen {killed}, went on from {summary['resumed_from']}")
    assert first_kept <= kept <= summary["resumed_from"] <= seen
    assert seen - summary["resumed_from"] <= 2 * EVERY  # one more may have been on its way to the disk
    assert_undisturbed(folder, undisturbed)


def chosen(folder: Path, victim: str) -> psutil.Process:
    first, others = ranks(folder)
    return first if victim == "rank 0" else others[0]


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
