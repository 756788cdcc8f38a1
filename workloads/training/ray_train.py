"""Running a training function on Ray Train workers, and what such a worker gives to the loop."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cluster.placement import Placement, place_here
from profiling.step_profiler import profile_steps
from workbench.errors import Failure, UserError
from workbench.runs import Run
from workbench.tracking import Tracker, read_metrics
from workloads.training.checkpoint import Checkpoints, Export, read_failures
from workloads.training.config import TrainingConfig
from workloads.training.divergence import Diverged
from workloads.training.history import History
from workloads.training.resume import CHECKPOINTS, adopt, forget_after, what_is_left
from workloads.training.zero import AnyOptimizer, check_installed

RESIZE_SECONDS = 60.0
"""How often Ray Train looks for hosts that came, where ``least_workers`` lets the number of workers change."""


def fit(worker: Callable[[dict[str, Any]], Any], payload: dict[str, Any], config: TrainingConfig, run: Run) -> Any:
    """Run ``worker(payload)`` on ``config.workers`` Ray Train workers; returns what rank 0 returned.

    A worker that dies is replaced, with all others, up to ``config.max_failures`` times, and ``worker`` runs again:
    it finds its last checkpoint with ``WorkerEvents.resume``. With ``config.resume`` that of another run comes first.
    With ``config.least_workers`` as many go on as the cluster holds, and begin again with more when it holds more.
    Raises UserError where the cluster can never place the workers, the other run was another training or ``worker``
    raised one, Failure where training did not end.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from workloads.training.devices import torch_config

    if config.resume is not None:
        run.say(f"going on from step {adopt(config.resume, run, config.divergence)} of {config.resume}")
    placement = check_placement(config, run.say)
    trainer = TorchTrainer(
        partial(_unless_in_vain, worker),
        train_loop_config={**payload, "run_folder": str(run.folder)},
        torch_config=torch_config(placement, config),
        scaling_config=ScalingConfig(
            num_workers=config.workers if config.least_workers is None else (config.least_workers, config.workers),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=placement.num_gpus > 0,
            resources_per_worker=placement.bundle(),
            label_selector=placement.label_selector or None,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env=placement.runtime_env() or None,
        ),
    )
    with _telling(run, config.steps):
        try:
            done = trainer.fit().return_value
        except TrainingFailedError as error:
            raise Failure(f"training failed: {_cause(error)}; {what_is_left(run, rule=config.divergence)}") from error
    if isinstance(done, UserError):
        raise done
    if isinstance(done, Diverged):
        raise Failure(f"training was stopped: {done}; {what_is_left(run, done.since, config.divergence)}")
    return done


def _unless_in_vain(worker: Callable[[dict[str, Any]], Any], payload: dict[str, Any]) -> Any:
    """What ``worker`` returns, or the error that it would raise again: Ray Train would begin anew after any other."""
    try:
        return worker(payload)
    except (Diverged, UserError) as error:
        return error


def check_placement(config: TrainingConfig, say: Callable[[str], Any] = lambda _: None) -> Placement:
    """Where the workers go; ``say`` hears what they must wait for.

    Raises UserError at once for what Ray would leave pending for ever, workers that the cluster can never hold, and
    for a strategy that is not installed.
    """
    check_installed(config)
    return place_here(config.request(), say, workers=config.least_workers or config.workers)


class WorkerEvents:
    """The loop's events in a Ray Train worker: rank 0 tracks metrics, all ranks checkpoint to the run's storage.

        with WorkerEvents(run_folder, rank, config) as events:
            history = train(model, ..., events=events, history=events.resume(model, optimizer))

    ``export`` makes, of the model, what writes its weights beside a checkpoint; every rank calls it.
    """

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        config: TrainingConfig,
        export: Callable[[nn.Module], Export] | None = None,
    ) -> None:
        self.folder, self._rank, self._export = run_folder, rank, export
        in_doubt = config.divergence.steps if config.divergence else 0
        self._checkpoints = Checkpoints(run_folder / CHECKPOINTS, config.keep_last, in_doubt)
        self.loaded: tuple[int, float] | None = None
        """Step and held-out loss of the weights that ``load_best`` found."""
        self._tracker: Tracker | None = None
        self._trace = config.trace

    def __enter__(self) -> "WorkerEvents":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last checkpoint and flush the metrics."""
        self._checkpoints.wait()
        if self._tracker:
            self._tracker.close()

    def log(self, step: int, **values: float) -> None:
        """Append to the run's metrics."""
        if self._tracker:
            self._tracker.log(step, **values)

    def checkpoint(self, history: History, model: nn.Module, optimizer: AnyOptimizer) -> None:
        """Begin to write a checkpoint."""
        self._checkpoints.save(history, model, optimizer, self._export(model) if self._export else None)

    def resume(self, model: nn.Module, optimizer: AnyOptimizer) -> History:
        """Load the last checkpoint of this run; returns its history, an empty one where there is none.

        What was measured and sampled after it is forgotten: those steps will be done again.
        """
        history = self._checkpoints.load(model, optimizer) or History()
        if self._rank == 0:
            forget_after(history.step, self.folder)
            self._tracker = Tracker(self.folder, first_step=history.step + 1)
        if self._trace is not None:
            profile_steps(optimizer, self._trace, self.folder / "artifacts" / "trace", self._rank, history.step)
        return history

    def load_best(self, model: nn.Module) -> None:
        """Load the weights of the lowest held-out loss that a checkpoint has into ``model``."""
        self.loaded = self._checkpoints.load_best(model)


@contextmanager
def _telling(run: Run, steps: int) -> Iterator[None]:
    """Say the newest figures every few seconds, from what rank 0 writes, and each checkpoint that failed."""
    stop = threading.Event()

    def tell() -> None:
        said, failed = {"time": 0.0}, 0
        while not stop.wait(4):
            failures = read_failures(run.folder / CHECKPOINTS)
            for failure in failures[failed:]:
                run.say(f"the checkpoint of step {failure['step']} could not be written: {failure['cause']}")
            failed = len(failures)
            rows = read_metrics(run.folder)
            if rows and rows[-1]["time"] > said["time"]:
                said = rows[-1]
                run.say(f"step {said['step']} of {steps}: {_latest(rows)}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _latest(rows: list[dict[str, Any]]) -> str:
    shown = {
        "loss": "loss {:.3f}",
        "validation_loss": "held-out loss {:.3f}",
        "validation_accuracy": "{:.1%} of held-out pairs told apart",
        "tokens_per_second": "{:,.0f} tokens/s",
        "model_flop_utilisation": "{:.1%} of the cards' FLOP/s",
    }
    values = {key: row[key] for row in rows for key in shown if row.get(key) is not None}
    return ", ".join(shown[key].format(values[key]) for key in shown if key in values)


def _cause(error: Any) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"worker {rank}: {str(e).strip().splitlines()[-1]}" for rank, e in failures.items()) or str(error)
