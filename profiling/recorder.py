"""A sampler on every host, writing Parquet parts as the samples come.

    with recording(run):          # what --profile does around a command
        work()
    add_to_report(run)

Each host writes ``RUN/artifacts/samples/<host>/part-<epoch ms>.parquet`` (columns time: epoch seconds on the host's
steady axis, metric, device, value), ``marks.jsonl``, and ``host.json``: its facts, the sensors it lacks, what sampling
cost. A part is whole or absent and holds the samples of ``PART_SECONDS``, which is all that a killed host can lose.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from profiling.apple import AppleSampler
from profiling.clock import STEP_SECONDS, SteadyClock
from profiling.listener import MarkListener, append_marks
from profiling.nvidia import NvidiaSampler
from profiling.ray_sampler import ObjectStoreSampler, RayProcessSampler
from profiling.samplers import HostSampler, Reading, Sampler
from workbench.cost import energy_told, write_energy
from workbench.errors import Failure, UserError
from workbench.files import read_record, write_atomic, write_json
from workbench.runs import Run

HERTZ = 10.0
SLOW_SECONDS = 1.0
PART_SECONDS = 5.0
FIRST_SAMPLE_SECONDS = 30.0
MOST_HELD = 500_000
"""Readings that wait for the storage: some ten minutes of a host with cards."""
SAMPLES = "samples"


class HostRecorder:
    """Samples this host in a thread from its construction until ``stop``.

    ``folder`` is the recording's: it must exist, so that a host that does not see the shared storage is found at once
    (raises Failure). ``own_process`` says that it is a Ray actor, which does nothing else: Ray's own figures are
    sampled too, and its process's CPU time is kept beside that of sampling, for Ray's threads and the imports are in
    it. With ``export`` each reading is also a metric of Ray's.
    """

    def __init__(self, folder: str, hertz: float = HERTZ, own_process: bool = False, export: bool = False) -> None:
        self.host = socket.gethostname()
        if not Path(folder).is_dir():
            raise Failure(f"host {self.host} does not see {folder}: the runs root must be storage that all hosts share")
        self.folder = Path(folder, self.host)
        before = read_record(self.folder / "host.json") or {}  # of a sampler that was killed
        self._clock = SteadyClock.start(before.get("clock"))
        self._steps: list[dict[str, float]] = before.get("clock_steps", [])
        self._step = self._clock.step() if before else 0.0
        self._period = 1 / hertz
        self._own_process = own_process
        self._samplers: list[Sampler] = [HostSampler(), NvidiaSampler(max(0.1, self._period)), AppleSampler()]
        if own_process:
            self._samplers += [RayProcessSampler(), ObjectStoreSampler()]
        self._exporter = _exporter(self.host) if export else None
        self._marks = MarkListener()
        self._buffer: list[tuple[float, Reading]] = []
        self._count = 0
        self._cpu_before = time.process_time()
        encode([(0.0, Reading("", "", 0.0))])  # what it imports takes 0.3 s, once, and is no cost of a sample
        self._begun = time.monotonic()
        self._stop = threading.Event()
        self._sampled = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        self._keep()  # the host's facts are there before its first part
        next_sample = part_begun = time.monotonic()
        slow_at = next_sample
        while not self._stop.is_set():
            when = time.monotonic()
            now = self._clock.now()
            readings = [reading for sampler in self._samplers for reading in _ask(sampler, sampler.read)]
            if when >= slow_at:
                readings += [reading for sampler in self._samplers for reading in _ask(sampler, sampler.read_slowly)]
                slow_at = when + SLOW_SECONDS
                self._watch_clock()
                if self._exporter:
                    self._exporter.show(readings)
            self._buffer += [(now, reading) for reading in readings]
            self._count += 1
            self._sampled.set()
            if when - part_begun >= PART_SECONDS:
                self._keep()
                part_begun = when
            # a late sample does not shift the following ones, nor do several come at once to catch up
            next_sample = max(next_sample + self._period, time.monotonic())
            self._stop.wait(next_sample - time.monotonic())
        self._write()

    def _on_axis(self, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``marks`` with their time on the host's axis, which after another start of the host has another anchor."""
        return [
            {**mark, "axis": self._clock.at(mark["monotonic"])} if isinstance(mark.get("monotonic"), float) else mark
            for mark in marks
        ]

    def _watch_clock(self) -> None:
        """Note where somebody set the wall clock: the axis does not follow it."""
        step = self._clock.step()
        if abs(step - self._step) > STEP_SECONDS:
            self._steps.append({"time": self._clock.now(), "seconds": round(step - self._step, 3)})
            self._step = step

    def _keep(self) -> None:
        """Write what is held. Where the storage is full or away it is held for the next time, the newest of it."""
        try:
            self._write()
        except OSError:
            del self._buffer[:-MOST_HELD]

    def _write(self) -> None:
        """Write the buffer as one part and the marks, then the host's facts with the cost so far."""
        if self._buffer:
            write_part(self.folder, self._buffer)
            self._buffer = []
        self.folder.mkdir(parents=True, exist_ok=True)
        append_marks(self.folder / "marks.jsonl", self._on_axis(self._marks.take()))
        facts: dict[str, Any] = {"host": self.host, "hertz": 1 / self._period, "missing": {}}
        for sampler in self._samplers:
            facts |= sampler.facts()
            facts["missing"] |= sampler.missing
        if self._exporter:
            self._exporter.show_facts(facts)
        wall = time.monotonic() - self._begun
        facts["clock"] = self._clock.to_json()
        facts["clock_steps"] = self._steps
        facts["samples"] = self._count
        facts["achieved_hertz"] = round(self._count / wall, 2) if wall > 1 else None
        facts["sampler_cpu_seconds"] = round(self._cost(), 3)
        if self._own_process:
            facts["sampler_process_cpu_seconds"] = round(time.process_time() - self._cpu_before, 3)
        facts["sampler_wall_seconds"] = round(wall, 3)
        write_json(self.folder / "host.json", facts)

    def _cost(self) -> float:
        """CPU seconds of the sampling threads; called in the first of them."""
        return time.thread_time() + sum(getattr(sampler, "pcie_cpu_seconds", 0.0) for sampler in self._samplers)

    def ready(self) -> str:
        """The host's name, once it has its first sample."""
        self._sampled.wait(FIRST_SAMPLE_SECONDS)
        return self.host

    def now(self) -> float:
        """Epoch seconds on the host's axis: what its offset is measured by."""
        return self._clock.now()

    def stop(self) -> None:
        """Take no more samples and write what is held."""
        self._stop.set()
        self._thread.join()
        self._marks.close()
        append_marks(self.folder / "marks.jsonl", self._on_axis(self._marks.take()))
        for sampler in self._samplers:
            sampler.close()


def _ask(sampler: Sampler, read: Callable[[], list[Reading]]) -> list[Reading]:
    """What a sampler reads; one that fails in the middle is named, and the others go on."""
    try:
        return read()
    except Exception as error:  # whatever a driver, a kernel or a library comes up with
        sampler.missing[type(sampler).__name__] = f"{error!r}, in the middle of the recording"
        return []


def _exporter(host: str) -> Any:
    from profiling.exporter import MetricsExporter

    return MetricsExporter(host)


def write_part(folder: Path, samples: list[tuple[float, Reading]]) -> Path:
    """Write (epoch seconds, reading) pairs as one Parquet part in ``folder``, atomically; the part's path."""
    path = folder / f"part-{int(samples[0][0] * 1000)}.parquet"
    write_atomic(path, encode(samples))
    return path


def encode(samples: list[tuple[float, Reading]]) -> bytes:
    """The Parquet file of a part."""
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
    return bytes(sink.getvalue().to_pybytes())


@contextmanager
def recording(run: Run, hertz: float = HERTZ) -> Iterator[None]:
    """Sample while the block runs: every host of the connected cluster, or this one where Ray is not used."""
    import ray

    from profiling.cluster_recording import ClusterRecording

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
        _keep_energy(run)


def _keep_energy(run: Run) -> None:
    """Write down and tell what the cards took; also of a run that failed."""
    from profiling.shares import total_joules
    from profiling.trace import read_recording

    try:
        recorded = read_recording(run.folder)
    except UserError:  # it ended before its first part
        return
    joules = total_joules(recorded, *recorded.span)
    write_energy(run.folder, joules)
    if joules is not None:
        run.say(energy_told(joules))


def add_to_report(run: Run) -> None:
    """Draw what ``recording`` sampled into the run's report."""
    from profiling.page import add_pages
    from profiling.trace import read_recording

    run.report.heading("Profile", "Sampled while the command ran (--profile).")
    add_pages(run.report, read_recording(run.folder))
