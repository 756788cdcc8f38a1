"""Made inputs that several tests share."""

import time
from pathlib import Path

from profiling.recorder import write_part
from profiling.samplers import Reading


def made_recording(folder: Path, busy: float = 50.0) -> Path:
    """A run folder with five samples of one host, whose cores are ``busy`` percent."""
    now = time.time()
    readings = (("cpu.busy", busy), ("memory.used", 1e9))
    samples = [(now + t, Reading(metric, "", value)) for t in range(5) for metric, value in readings]
    write_part(folder / "artifacts" / "samples" / "somehost", samples)
    return folder
