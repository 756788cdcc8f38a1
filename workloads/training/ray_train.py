"""Running a training function on Ray Train workers, and what such a worker gives to the loop."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.placement import Placement, place_here
from workbench.errors import Failure
from workbench.runs import Run
from workbench.tracking import Tracker, read_metrics
from workloads.training.checkpoint import load_checkpoint, save_checkpoint
from workloads.training.config import TrainingConfig


def fit(worker: Callable[[dict[str, Any]], Any], payload: dict[str, Any], config: TrainingConfig, run: Run) -> Any:
    """Run ``worker(payload)`` on ``config.workers`` Ray Train workers; returns what rank 0 returned.

    A worker that dies is replaced, with all others, up to ``config.max_failures`` times, and ``worker`` runs again:
    it finds its last checkpoint with ``WorkerEvents.resume``. Raises UserError where the cluster can never place the
    workers, Failure where training did not end.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from workloads.training.devices import torch_config

    placement = check_placement(config, run.say)
    trainer = TorchTrainer(
        worker,
        train_loop_config={**payload, "run_folder": str(run.folder)},
        torch_config=torch_config(placement),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=placement.num_gpus > 0,
            resources_per_worker=placement.bundle(),
            label_selector=placement.label_selector or None,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env=placement.runtime_env() or None,
        ),
    )
    with _telling(run, config.steps):
        try:
            return trainer.fit().return_value
        except TrainingFailedError as error:
            raise Failure(f"training failed: {_cause(error)}; {run.folder / 'metrics.jsonl'} has its steps") from error


def check_placement(config: TrainingConfig, say: Callable[[str], Any] = lambda _: None) -> Placement:
    """Where the workers go; ``say`` hears what they must wait for.

    Raises UserError at once for what Ray would leave pending for ever: workers that the cluster can never hold.
    """
    return place_here(config.request(), say, workers=config.workers)


class WorkerEvents:
    """The loop's events in a Ray Train worker: rank 0 tracks metrics, all ranks checkpoint to the run's storage."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._tracker = Tracker(run_folder) if rank == 0 else None

    def log(self, step: int, **values: float) -> None:
        """Append to the run's metrics."""
        if self._tracker:
            self._tracker.log(step, **values)

    def checkpoint(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the shards and hand them to Ray Train, which commits the checkpoint when every rank has reported."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), step, model, optimizer)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the last committed checkpoint of this run; returns its step, 0 where there is none."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            return load_checkpoint(Path(folder), model, optimizer)

    def close(self) -> None:
        """Flush the metrics."""
        if self._tracker:
            self._tracker.close()


@contextmanager
def _telling(run: Run, steps: int) -> Iterator[None]:
    """Say the newest loss every few seconds, from the metrics that rank 0 writes."""
    stop = threading.Event()

    def tell() -> None:
        said = 0
        while not stop.wait(4):
            rows = read_metrics(run.folder)
            if len(rows) > said:
                said = len(rows)
                run.say(f"step {rows[-1]['step']} of {steps}: {_latest(rows)}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _latest(rows: list[dict[str, Any]]) -> str:
    names = {"loss": "loss", "validation_loss": "held-out loss"}
    values = {key: row[key] for row in rows for key in names if row.get(key) is not None}
    return ", ".join(f"{names[key]} {value:.3f}" for key, value in values.items())


def _cause(error: Any) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"worker {rank}: {str(e).strip().splitlines()[-1]}" for rank, e in failures.items()) or str(error)
