"""A sampler on every host, writing Parquet parts as the samples come.

    with recording(run):          # what --profile does around a command
        work()
    add_to_report(run)

Each host writes ``RUN/artifacts/samples/<host>/part-<epoch ms>.parquet`` (columns time: epoch seconds, metric, device,
value) and ``host.json``: its facts, the sensors it lacks, what sampling cost. A part is whole or absent and holds the
samples of ``PART_SECONDS``, which is all that a killed host can lose.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from profiling.samplers import HostSampler, NvidiaSampler, Reading, Sampler
from workbench.errors import Failure
from workbench.files import write_atomic, write_json
from workbench.runs import Run

HERTZ = 2.0
PART_SECONDS = 5.0
FIRST_SAMPLE_SECONDS = 30.0
SAMPLES = "samples"


class HostRecorder:
    """Samples this host in a thread from its construction until ``stop``.

    ``folder`` is the recording's: it must exist, so that a host that does not see the shared storage is found at once
    (raises Failure). ``own_process`` says that the process does nothing else and all its CPU time is sampling's cost.
    """

    def __init__(self, folder: str, hertz: float = HERTZ, own_process: bool = False) -> None:
        self.host = socket.gethostname()
        if not Path(folder).is_dir():
            raise Failure(f"host {self.host} does not see {folder}: the runs root must be storage that all hosts share")
        self.folder = Path(folder, self.host)
        self._period = 1 / hertz
        self._own_process = own_process
        self._samplers: list[Sampler] = [HostSampler(), NvidiaSampler(pcie_period=max(0.5, self._period))]
        self._buffer: list[tuple[float, Reading]] = []
        self._count = 0
        self._cpu_before = time.process_time()
        self._begun = time.monotonic()
        self._stop = threading.Event()
        self._sampled = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        self._write()  # the host's facts are there before its first part
        next_sample = part_begun = time.monotonic()
        while not self._stop.is_set():
            now = time.time()
            self._buffer += [(now, reading) for sampler in self._samplers for reading in sampler.read()]
            self._count += 1
            self._sampled.set()
            if time.monotonic() - part_begun >= PART_SECONDS:
                self._write()
                part_begun = time.monotonic()
            # a late sample does not shift the following ones, nor do several come at once to catch up
            next_sample = max(next_sample + self._period, time.monotonic())
            self._stop.wait(next_sample - time.monotonic())
        self._write()

    def _write(self) -> None:
        """Write the buffer as one part, then the host's facts with the cost so far."""
        if self._buffer:
            write_part(self.folder, self._buffer)
            self._buffer = []
        facts: dict[str, Any] = {"host": self.host, "hertz": 1 / self._period, "missing": {}}
        for sampler in self._samplers:
            facts |= sampler.facts()
            facts["missing"] |= sampler.missing
        cost = time.process_time() - self._cpu_before if self._own_process else time.thread_time()
        facts["samples"] = self._count
        facts["sampler_cpu_seconds"] = round(cost, 3)
        facts["sampler_wall_seconds"] = round(time.monotonic() - self._begun, 3)
        write_json(self.folder / "host.json", facts)

    def ready(self) -> str:
        """The host's name, once it has its first sample."""
        self._sampled.wait(FIRST_SAMPLE_SECONDS)
        return self.host

    def stop(self) -> None:
        """Take no more samples and write what is held."""
        self._stop.set()
        self._thread.join()
        for sampler in self._samplers:
            sampler.close()


def write_part(folder: Path, samples: list[tuple[float, Reading]]) -> Path:
    """Write (epoch seconds, reading) pairs as one Parquet part in ``folder``, atomically; the part's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "time": pa.array([when for when, _ in samples], pa.float64()),
            "metric": pa.array([reading.metric for _, reading in samples]).dictionary_encode(),
            "device": pa.array([reading.device for _, reading in samples]).dictionary_encode(),
            "value": pa.array([float(reading.value) for _, reading in samples], pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path = folder / f"part-{int(samples[0][0] * 1000)}.parquet"
    write_atomic(path, sink.getvalue().to_pybytes())
    return path


class ClusterRecording:
    """A ``HostRecorder`` actor on every host of the connected cluster; hosts that join are found by ``refresh``."""

    def __init__(self, folder: Path, hertz: float = HERTZ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.hertz = hertz
        self.unrecorded: dict[str, str] = {}
        self._recorders: dict[str, Any] = {}
        self.refresh()
        if not self._recorders:
            raise Failure("; ".join(self.unrecorded.values()) or "the cluster has no host alive")

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts that are sampled."""
        return sorted(self._recorders)

    def refresh(self) -> None:
        """Start a sampler on each host that has none yet; one that cannot record is named in ``unrecorded``."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = ray.remote(num_cpus=0, max_restarts=-1)(HostRecorder)
        begun: dict[str, Any] = {}
        for node in ray.nodes():
            host = node["NodeManagerHostname"]
            # two raylets of one host share its sensors
            if node["Alive"] and not {host} & (self._recorders.keys() | self.unrecorded.keys() | begun.keys()):
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                begun[host] = actor.options(scheduling_strategy=place).remote(str(self.folder), self.hertz, True)
        for host, recorder in begun.items():
            try:
                ray.get(recorder.ready.remote(), timeout=120)
                self._recorders[host] = recorder
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                self.unrecorded[host] = f"{host}: {getattr(error, 'cause', None) or error}"

    def stop(self) -> None:
        """Flush every sampler and end its process; a host that has died meanwhile is left with what it wrote."""
        import ray

        stopping = [recorder.stop.remote() for recorder in self._recorders.values()]
        done, _ = ray.wait(stopping, num_returns=len(stopping), timeout=20)
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayError:
                continue
        for recorder in self._recorders.values():
            ray.kill(recorder)
        self._recorders = {}


@contextmanager
def recording(run: Run, hertz: float = HERTZ) -> Iterator[None]:
    """Sample while the block runs: every host of the connected cluster, or this one where Ray is not used."""
    import ray

    folder = run.artifact(SAMPLES, "x").parent
    recorder: ClusterRecording | HostRecorder
    if ray.is_initialized():
        recorder = ClusterRecording(folder, hertz)
        for reason in recorder.unrecorded.values():
            run.say(f"not profiled: {reason}")
    else:
        recorder = HostRecorder(str(folder), hertz)
    try:
        yield
    finally:
        recorder.stop()


def add_to_report(run: Run) -> None:
    """Draw what ``recording`` sampled into the run's report."""
    from profiling.timeline import add_timelines, read_samples

    run.report.heading("Profile", "Sampled while the command ran (--profile).")
    add_timelines(run.report, read_samples(run.folder / "artifacts" / SAMPLES), [])
