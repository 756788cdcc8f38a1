"""The processes of a trial of several workers: rank 0 is Tune's own actor, the others are actors that it owns.

All stand in the one placement group that Tune made for the trial, so a trial has its workers or does not begin; who is
owned ends with its owner, and removing the group ends all. There is no second controller, no second group and nobody
who must clean up after another, which is what hung where Ray Train ran inside Ray Tune. Every wait has an end: for the
workers to start, for the group to meet, for a collective, and for the others after one has died.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from torch import cuda

from tune.energy import EnergyMeter
from tune.kept_base import KeptBase
from tune.memory import out_of_memory
from tune.part import Ended, train_part
from workbench.config import adopt_environment
from workloads.training.config import TrainingConfig
from workloads.training.devices import backend_of, local_device
from workloads.training.divergence import Diverged

START_SECONDS = 300
"""Within which a worker's process has started: its imports, on a slow disk."""

GROUP_SECONDS = 600
"""After so long a collective is given up: NCCL and gloo then end the rank."""

LONGEST = 300
"""Characters of a reason."""

LAST_WORDS_SECONDS = 10.0
"""After a rank has failed, the time for another to say more of why."""


class WorkerLost(RuntimeError):
    """A process of a trial has died, or its group has broken: the trial goes on from its last checkpoint."""


@dataclass(frozen=True)
class Seat:
    """The place of one process in its group, which meets at ``address`` (tcp://HOST:PORT)."""

    rank: int
    local_rank: int
    world: int
    address: str


@contextmanager
def seated(seat: Seat, config: TrainingConfig) -> Iterator[None]:
    """Be ``seat.rank`` of the default process group for the block."""
    adopt_environment({"LOCAL_RANK": str(seat.local_rank)})  # DeepSpeed asks for it
    if config.gpus_per_worker:
        cuda.set_device(local_device(config, seat.local_rank))
    dist.init_process_group(
        backend_of(config), init_method=seat.address, rank=seat.rank, world_size=seat.world,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_of_the_group(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed"))
    )


class Peer:
    """The actor of a rank other than 0, which is used again for the next trial."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self._shared, self._base = shared, KeptBase()

    def host(self) -> str:
        """Where it stands."""
        return socket.gethostname()

    def run(self, trial: dict[str, Any], seat: Seat) -> dict[str, Any]:
        """Train; how it ended, and what its card took. An error is told, not raised: what Ray raises is a death."""
        config = self._shared["config"]
        meter = EnergyMeter(local_device(config, seat.local_rank), trial["gpus"])
        try:
            with seated(seat, config):
                train_part(self._shared, trial, self._base, None, seat.rank, seat.local_rank)
            return {"joules": meter.joules()}
        except (Ended, Diverged):
            return {"joules": meter.joules()}
        except Exception as error:
            self._base.drop()
            lines = str(error).strip().splitlines() or [""]
            reason = out_of_memory(error) or f"{type(error).__name__}: {lines[-1]}"
            return {"error": f"worker {seat.rank}: {reason}", "group": is_of_the_group(error)}


class Peers:
    """Ranks 1 and up of a trial, as rank 0 sees them. Raises WorkerLost where they do not start in time."""

    def __init__(self, shared: dict[str, Any], environment: dict[str, str]) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.get_current_placement_group()
        assert group is not None, "Tune gives every trial a placement group"
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        for index, bundle in enumerate(group.bundle_specs):
            if index == 0:
                continue
            rest = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
            self._actors.append(
                ray.remote(Peer).options(
                    num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), resources=rest,
                    runtime_env={"env_vars": environment} if environment else None,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, index, True),
                ).remote(shared)
            )  # fmt: skip
        try:
            self._hosts = ray.get([actor.host.remote() for actor in self._actors], timeout=START_SECONDS)
        except ray.exceptions.RayError as error:  # a timeout is one, too
            self.close()
            raise WorkerLost(f"its workers did not start: {last_words(str(error))}") from None

    def begin(self, trial: dict[str, Any], lost: Callable[[str], None]) -> Seat:
        """Have them train ``trial``; the seat of rank 0. ``lost`` hears of one that died, at once, and of one that has
        failed alone."""
        address = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
        seats, on_host = [], Counter[str]()
        for rank, host in enumerate([socket.gethostname(), *self._hosts]):
            seats.append(Seat(rank, on_host[host], 1 + len(self._hosts), address))
            on_host[host] += 1
        self._runs = [actor.run.remote(trial, seat) for actor, seat in zip(self._actors, seats[1:], strict=True)]
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(list(self._runs), self._over, lost), daemon=True).start()
        return seats[0]

    def finish(self) -> float | None:
        """Wait until all have ended as rank 0 has, and return what their cards took. Raises WorkerLost where one has
        not."""
        self._over.set()
        if words := self.last_words(LAST_WORDS_SECONDS, all_ended=True):
            raise WorkerLost(words)
        joules = [ray.get(run)["joules"] for run in self._runs]
        return None if None in joules else sum(joules)

    def last_words(self, seconds: float, *, all_ended: bool = False) -> str:
        """Why one of them failed, waiting so long for it; empty where none has. Best of all a reason of its own."""
        deadline, of_the_group = time.monotonic() + seconds, ""
        waiting = list(self._runs)
        while waiting and time.monotonic() < deadline:
            done, waiting = ray.wait(waiting, timeout=0.5)
            for run in done:
                words, only_the_group = _outcome(run)
                if words and not only_the_group:
                    return words
                of_the_group = of_the_group or words
        return of_the_group or ("a worker has not ended" if all_ended and waiting else "")

    def close(self) -> None:
        """End them, however they are."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._runs = [], []

    def _watch(self, waiting: list[Any], over: threading.Event, lost: Callable[[str], None]) -> None:
        while waiting and not over.is_set():
            done, waiting = ray.wait(waiting, timeout=1.0)
            for run in done:
                words, only_the_group = _outcome(run)
                if words and not only_the_group and not over.wait(LAST_WORDS_SECONDS):
                    lost(words)  # rank 0 would wait for it in a collective
                    return


def _outcome(run: Any) -> tuple[str, bool]:
    """What went wrong in a run that is over, and whether it only lost the others."""
    try:
        told = ray.get(run)
    except ray.exceptions.RayError as error:
        return f"a worker has died: {last_words(str(error))}", False
    return told.get("error", ""), told.get("group", False)


def last_words(death: str) -> str:
    """Of what Ray or Tune says of a death the line that says most: Ray's, without its guesses at the cause, or the
    last."""
    lines = [line.strip() for line in death.splitlines() if line.strip()]
    because = next((line for line in lines if line.startswith("The actor is dead because")), "")
    words = because.partition(" Some common causes")[0] or (lines[-1] if lines else "its process has died")
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
