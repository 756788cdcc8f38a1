"""The memory of a program and of everything it starts, Ray's processes included."""

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Peak:
    """The largest sums over a process tree, bytes. ``pss`` counts a shared page once, divided among its users: what the
    machine must have. ``rss`` counts it once for each. ``largest`` are the processes at the peak of ``pss``."""

    pss: int = 0
    rss: int = 0
    largest: tuple[tuple[str, int], ...] = ()


def run_measured(command: Sequence[str], environment: Mapping[str, str], output: Path, every: float = 2) -> Peak:
    """Run ``command``, its output into ``output``, and sample the memory of its process tree. Raises
    CalledProcessError if it fails."""
    peak = Peak()
    ended = threading.Event()
    with output.open("w") as stream:
        process = subprocess.Popen(command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT)
        sampler = threading.Thread(target=_sample, args=(psutil.Process(process.pid), peak, ended, every))
        sampler.start()
        try:
            code = process.wait()
        finally:
            ended.set()
            sampler.join()
    if code:
        print(output.read_text()[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(code, command)
    return peak


def _sample(root: psutil.Process, peak: Peak, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        sizes = []
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                memory = process.memory_full_info()
                sizes.append((process.name(), getattr(memory, "pss", memory.rss), memory.rss))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # ended meanwhile
        if (pss := sum(size for _, size, _ in sizes)) > peak.pss:
            peak.pss = pss
            peak.largest = tuple((name, size) for name, size, _ in sorted(sizes, key=lambda s: -s[1])[:4])
        peak.rss = max(peak.rss, sum(size for _, _, size in sizes))
