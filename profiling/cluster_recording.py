"""A ``HostRecorder`` actor pinned to every host of the connected cluster, and the offsets of the hosts' clocks."""

import socket
import threading
from pathlib import Path
from typing import Any

from profiling.clock import SteadyClock, measure_offset
from profiling.recorder import HERTZ, HostRecorder
from workbench.errors import Failure
from workbench.files import write_json

LOOK_FOR_HOSTS_SECONDS = 5.0
CLOCKS = "clocks.json"
ACTORS = "actors.json"


class ClusterRecording:
    """Records every host from its construction until ``stop``; a host that joins meanwhile is found within seconds.

    ``FOLDER/clocks.json`` has the offsets of the hosts' clocks over ours, and ``FOLDER/actors.json`` the names of the
    actors by host and process.
    """

    def __init__(self, folder: Path, hertz: float = HERTZ, export: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.unrecorded: dict[str, str] = {}
        self._hertz, self._export = hertz, export
        self._recorders: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._clock = SteadyClock.start()
        self._offsets: dict[str, list[dict[str, float]]] = {}
        self._actors: dict[str, dict[str, dict[str, str]]] = {}
        self._stop = threading.Event()
        self.refresh()
        if not self._recorders:
            raise Failure("; ".join(self.unrecorded.values()) or "the cluster has no host alive")
        self._measure_clocks()
        self._thread = threading.Thread(target=self._look, name="hosts", daemon=True)
        self._thread.start()

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts that are sampled."""
        return sorted(self._recorders)

    def _look(self) -> None:
        while not self._stop.wait(LOOK_FOR_HOSTS_SECONDS):
            before = dict(self._nodes)
            self.refresh()
            if self._nodes != before:
                self._measure_clocks()
            self._name_actors()

    def refresh(self) -> None:
        """Start a sampler on each host that has none yet, or was started again; one that cannot record is named in
        ``unrecorded``."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = ray.remote(num_cpus=0, max_restarts=-1)(HostRecorder)
        begun: dict[str, Any] = {}
        nodes = ray.nodes()
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        for host in [host for host, node in self._nodes.items() if node not in alive]:
            del self._nodes[host]
            self._recorders.pop(host, None)  # Ray ended it with its node; a host that comes back is another node
        for node in nodes:
            host = node["NodeManagerHostname"]
            # two raylets of one host share its sensors
            if node["Alive"] and not {host} & (self._recorders.keys() | self.unrecorded.keys() | begun.keys()):
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                begun[host] = actor.options(scheduling_strategy=place).remote(
                    str(self.folder), self._hertz, True, self._export
                )
                self._nodes[host] = node["NodeID"]
        for host, recorder in begun.items():
            try:
                ray.get(recorder.ready.remote(), timeout=120)
                self._recorders[host] = recorder
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                self.unrecorded[host] = f"{host}: {getattr(error, 'cause', None) or error}"

    def _measure_clocks(self) -> None:
        """Measure the offset of each host's clock over ours; of one that does not answer the last stands."""
        import ray

        for host, recorder in self._recorders.items():
            try:
                offset = measure_offset(lambda: float(ray.get(recorder.now.remote(), timeout=10)), self._clock)  # noqa: B023
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                continue
            self._offsets.setdefault(host, []).append(offset)
        reference = {"host": socket.gethostname(), **self._clock.to_json()}
        write_json(self.folder / CLOCKS, {"reference": reference, "offsets": self._offsets})

    def _name_actors(self) -> None:
        """Write down the name and class of every actor that lives, by host and process."""
        import ray
        from ray.util.state import list_actors

        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        try:
            actors = list_actors(
                ray.get_runtime_context().gcs_address,
                filters=[("state", "=", "ALIVE")],
                limit=1000,
                raise_on_missing_output=False,
            )
        except Exception as error:  # the dashboard may be off or busy: names are worth less than the recording
            write_json(self.folder / ACTORS, {**self._actors, "error": str(error)})
            return
        for actor in actors:
            names = {"name": actor.name or "", "class": actor.class_name or "", "job": actor.job_id or ""}
            self._actors.setdefault(hosts.get(actor.node_id, ""), {})[str(actor.pid)] = names
        write_json(self.folder / ACTORS, self._actors)

    def stop(self) -> None:
        """Flush every sampler and end its process; a host that has died meanwhile is left with what it wrote."""
        import ray

        self._stop.set()
        self._thread.join()
        self._measure_clocks()
        self._name_actors()
        stopping = [recorder.stop.remote() for recorder in self._recorders.values()]
        done = ray.wait(stopping, num_returns=len(stopping), timeout=20)[0] if stopping else []
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayError:
                continue
        for recorder in self._recorders.values():
            ray.kill(recorder)
        self._recorders = {}
