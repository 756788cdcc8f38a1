"""Ray on this host: its object store, and its processes by what they run for which job."""

import time
from typing import Any

import psutil

from profiling.samplers import Reading

LOOK_FOR_PROCESSES_SECONDS = 4.0
LOOKS = 3
"""A process gets its Ray title some seconds after its start; one without after so many looks is none of Ray's."""


NO_JOB = "ffffffff"
"""Ray's id of no job: a worker that was started ahead of any has it, and the actors' table knows better."""


class RayProcessSampler:
    """CPU and memory of each of Ray's processes on this host, whose title is ``ray::`` and what it runs.

    Every process of the host is looked at a few times and then, unless it is one, no more.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._looked: dict[int, int] = {}
        self._known: dict[int, tuple[psutil.Process, float, float]] = {}
        self._names: dict[str, dict[str, str]] = {}
        self._last_look = float("-inf")

    def read(self) -> list[Reading]:
        """Nothing: there may be hundreds."""
        return []

    def read_slowly(self) -> list[Reading]:
        """Percent of a core since the last call, and resident bytes, by process."""
        now = time.monotonic()
        if now - self._last_look >= LOOK_FOR_PROCESSES_SECONDS:
            self._last_look = now
            self._look()
        readings = []
        for pid, (process, spent, when) in list(self._known.items()):
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info().rss
            except psutil.Error:
                del self._known[pid]
                continue
            total = times.user + times.system
            if when:
                readings.append(Reading("process.cpu", str(pid), 100 * (total - spent) / max(now - when, 1e-3)))
            readings.append(Reading("process.memory", str(pid), memory))
            self._known[pid] = (process, total, now)
        return readings

    def _look(self) -> None:
        pids = set(psutil.pids())
        self._looked = {pid: looks for pid, looks in self._looked.items() if pid in pids}
        for pid in pids:
            if self._looked.get(pid, 0) >= LOOKS:
                continue
            self._looked[pid] = self._looked.get(pid, 0) + 1
            try:
                process = psutil.Process(pid)
                title = next(iter(process.cmdline()), "")
                if not title.startswith("ray::"):
                    continue
                job = self._names.get(str(pid), {}).get("job") or process.environ().get("RAY_JOB_ID", "").replace(
                    NO_JOB, ""
                )
            except psutil.Error:
                continue
            self._looked[pid] = 0  # an idle worker becomes an actor: look again
            what = title.removeprefix("ray::").partition(".")[0].partition("(")[0]
            if what != "IDLE":
                self._names[str(pid)] = {"runs": what, "job": job}
            self._known.setdefault(pid, (process, 0.0, 0.0))

    def facts(self) -> dict[str, Any]:
        """What each process ran last."""
        return {"processes": self._names}

    def close(self) -> None:
        """Nothing is held open."""


class ObjectStoreSampler:
    """Bytes in the object store of the raylet that this process belongs to; needs a connection to Ray."""

    def __init__(self) -> None:
        import ray
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

        self.missing: dict[str, str] = {}
        own = ray.get_runtime_context().get_node_id()
        [node] = [node for node in ray.nodes() if node["NodeID"] == own]
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self._ask = node_manager_pb2_grpc.NodeManagerServiceStub(channel).GetNodeStats
        self._question = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        self._capacity = 0
        self.read_slowly()

    def read(self) -> list[Reading]:
        """Nothing: an answer takes a millisecond of the raylet's."""
        return []

    def read_slowly(self) -> list[Reading]:
        """Bytes in use, and spilled since the raylet's start."""
        import grpc

        try:
            store = self._ask(self._question, timeout=1).store_stats
        except grpc.RpcError as error:
            self.missing["object_store"] = f"the raylet does not answer: {error.code().name}"
            return []
        self.missing.pop("object_store", None)
        self._capacity = store.object_store_bytes_avail
        return [
            Reading("object_store.used", "", store.object_store_bytes_used),
            Reading("object_store.spilled_bytes", "", store.spilled_bytes_total),
        ]

    def facts(self) -> dict[str, Any]:
        """Bytes that the store may hold."""
        return {"object_store_bytes": self._capacity}

    def close(self) -> None:
        """The channel ends with its process."""
