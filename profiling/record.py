"""``workbench profile record``: sample every host of the cluster until it is told to stop.

workbench profile record hertz=2 seconds=60
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pydantic import Field

from profiling.cluster_recording import ClusterRecording
from profiling.page import add_pages, sampling_cost_percent, summarize
from profiling.recorder import HERTZ, SAMPLES
from profiling.trace import read_recording
from workbench.config import Config, OutputPath
from workbench.errors import UserError
from workbench.runs import Run, Summary


class RecordConfig(Config):
    """What to record, and until when."""

    hertz: float = Field(HERTZ, gt=0, le=50, description="samples a second on each host")
    seconds: float | None = Field(None, gt=0, description="stop after so long; without it, when told to")
    stop_file: OutputPath | None = Field(None, description="stop as soon as this file exists")
    export: bool = Field(True, description="show the samples on Ray's metrics port, for Prometheus")


def run(config: RecordConfig, run: Run) -> Summary:
    """Record until Ctrl-C, SIGTERM, ``stop_file`` or ``seconds``: each of them ends the recording in order."""
    if config.stop_file is not None and config.stop_file.exists():
        raise UserError(f"the stop file {config.stop_file} is there already: remove it or name another")
    with _told_to_stop() as told:
        samples = ClusterRecording(run.artifact(SAMPLES, "x").parent, config.hertz, config.export)
        begun = time.monotonic()  # every host has its first sample
        try:
            run.say(f"recording {', '.join(samples.hosts)} at {config.hertz:g} Hz; Ctrl-C ends it")
            for reason in samples.unrecorded.values():
                run.say(f"not recorded: {reason}")
            _wait(config, samples, run, begun, told)
        finally:
            samples.stop()
        recorded = samples.folder
        run.say(f"stopped after {time.monotonic() - begun:.0f} s")

    recording = read_recording(recorded)
    for trace in recording.hosts.values():
        run.say(
            f"{trace.host}: {trace.facts['achieved_hertz'] or 0:g} samples a second, "
            f"{sampling_cost_percent(trace) or 0:.2f}% of a core"
        )
    run.report.heading("Recording", "One timeline per host.")
    add_pages(run.report, recording)
    return summarize(recording)


def _wait(config: RecordConfig, samples: ClusterRecording, run: Run, begun: float, told: threading.Event) -> None:
    known = samples.hosts
    while not told.wait(0.2):
        if config.seconds is not None and time.monotonic() - begun >= config.seconds:
            return
        if config.stop_file is not None and config.stop_file.exists():
            return
        if samples.hosts != known:
            known = samples.hosts
            run.say(f"recording {', '.join(known)}")


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets during the block: being told to stop is this command's normal end."""
    told = threading.Event()

    def tell(signum: int, frame: FrameType | None) -> None:
        told.set()

    before = {signum: signal.signal(signum, tell) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
