"""One trial: the workload's own loop in a thread of a Ray Tune actor, which is used again for the next trial.

Tune asks the actor for one result after the other; a result is a look at the held-out loss. Between two looks nothing
of Tune's is in the way. When the trial is to end, the loop learns it where it reported last: it writes a checkpoint and
returns, and only then does the actor let go of it. What a trial writes is below ``trials/NUMBER``, a run folder in
small: checkpoints, metrics, the adapter or model. A trial of several workers has the others in ``group.Peers``.
"""

import contextlib
import queue
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from torch import cuda

from profiling import phase
from tune.energy import EnergyMeter
from tune.group import LAST_WORDS_SECONDS, Peers, Seat, WorkerLost, is_of_the_group, seated
from tune.kept_base import KeptBase
from tune.memory import kernel_kills, out_of_memory
from tune.part import PARTIAL, Ended, is_there, take_environment, train_part
from workbench.errors import UserError
from workbench.files import write_atomic, write_json
from workloads.training.devices import CardTooSmall, local_device
from workloads.training.divergence import Diverged
from workloads.training.resume import CHECKPOINTS

RESULT = "result"
"""The folder of a trial that holds its adapter or model, once it finished."""

ORDER = "end"
"""A file in a trial's folder: the trial is to end where it reports next."""

WHERE = "where.json"
"""A file in a trial's folder: Ray's node that it runs on, and how many processes its kernel had killed before."""


class TrialActor(tune.Trainable):
    """Ray Tune's actor. ``shared`` has the workload's name, its config and payload, the folder of all trials, and
    whether checkpoints outlive their trial, which other trials may copy.

    A trial's config has its number, point, the bytes that its card must hold, and the environment and cards that it was
    placed on.
    """

    _thread: threading.Thread | None
    _began: float
    _ready: float

    def setup(self, config: dict[str, Any], shared: dict[str, Any]) -> None:
        """Called in a new process."""
        self._shared, self._base = shared, KeptBase()
        self._peers: Peers | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called in a process that had another trial before: its imports are warm."""
        self._finish()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Called before the process ends; returns when the loop has written its checkpoint."""
        self._finish()
        self._drop_peers()

    def step(self) -> dict[str, Any]:
        """The next look of the trial, or how it ended. Raises WorkerLost where one of its processes is gone."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._go.put(True)
        result = self._results.get()
        if "lost" in result:
            self._is_lost = True  # its thread may wait for ever
            raise WorkerLost(result["lost"])
        card = cuda.get_device_name(0) if self._trial["gpus"] and cuda.is_available() else ""
        seen = {"host": socket.gethostname(), "card": card, "setup": self._ready - self._began}
        return {"joules": self._joules(), **result, **seen}

    def report(self, result: dict[str, Any]) -> bool:
        """Called by the loop: hand over a look, and wait for the word; False where the trial is to end."""
        self._results.put(result)
        return self._go.get() and not is_there(self._folder, ORDER)

    def is_ready(self) -> None:
        """Called by the loop when it has a model and can train."""
        self._ready = time.time()

    def _begin(self, trial: dict[str, Any]) -> None:
        self._trial = trial
        self._thread, self._is_lost = None, False
        self._meter: EnergyMeter | None = None
        self._others: float | None = None
        self._folder = Path(self._shared["folder"]) / str(trial["number"])
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._go: queue.Queue[bool] = queue.Queue()
        self._began = time.time()
        self._ready = self._began

    def _finish(self) -> None:
        if self._thread is not None and not self._is_lost:
            self._go.put(False)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ORDER).unlink(missing_ok=True)
            if ray.is_initialized():
                node = ray.get_runtime_context().get_node_id()
                write_json(self._folder / WHERE, {"node": node, "kernel_kills": kernel_kills()})
            with phase("trial", self._trial["number"]), self._group() as seat:
                facts = self._train(seat)
            self._end("finished", facts=facts)
        except Ended:
            self._end("ended")
        except Diverged as error:
            self._end("diverged", reason=str(error))
        except WorkerLost as error:
            self._drop_peers()
            self._results.put({"lost": str(error)})
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Tell what went wrong; where the group broke, what broke it."""
        self._base.drop()
        memory, words = out_of_memory(error), ""
        if self._peers is not None:
            if not memory and is_of_the_group(error):
                words = self._peers.last_words(LAST_WORDS_SECONDS) or str(error).strip()
            self._drop_peers()
        lines = str(error).strip().splitlines() or [""]
        if words:
            self._results.put({"lost": words})
        elif memory or isinstance(error, CardTooSmall):
            self._end("does not fit", reason=memory or str(error))
        elif isinstance(error, UserError):
            self._end("failed", reason=str(error))
        else:
            write_atomic(self._folder / "error.txt", traceback.format_exc())
            self._end("failed", reason=f"{type(error).__name__}: {lines[-1]}")

    @contextlib.contextmanager
    def _group(self) -> Iterator[Seat | None]:
        """The group of the trial's workers for the block, with this process as rank 0; None where it is alone."""
        take_environment(self._trial)
        config = self._shared["config"]
        self._meter = EnergyMeter(local_device(config), self._trial["gpus"])
        if config.workers == 1:
            yield None
            return
        if self._peers is None:
            self._peers = Peers(self._shared, self._trial["environment"])
        seat = self._peers.begin(self._trial, lambda words: self._results.put({"lost": words}))
        try:
            with seated(seat, config):
                yield seat
        except (Ended, Diverged):
            self._others = self._peers.finish()
            raise
        self._others = self._peers.finish()

    def _train(self, seat: Seat | None) -> dict[str, Any]:
        for left in (RESULT, PARTIAL):
            shutil.rmtree(self._folder / left, ignore_errors=True)
        place = () if seat is None else (seat.rank, seat.local_rank)
        facts = train_part(self._shared, self._trial, self._base, self, *place)
        (self._folder / PARTIAL).rename(self._folder / RESULT)
        if not self._shared["keep_checkpoints"]:
            shutil.rmtree(self._folder / CHECKPOINTS, ignore_errors=True)
        return facts

    def _joules(self) -> float | None:
        """What the trial's cards have taken; None until the other ranks have told, which they do when they end."""
        own = None if self._meter is None else self._meter.joules()
        if self._shared["config"].workers == 1:
            return own
        return None if own is None or self._others is None else own + self._others

    def _drop_peers(self) -> None:
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    def _end(self, outcome: str, **more: Any) -> None:
        self._results.put({"done": True, "outcome": outcome, **more})
