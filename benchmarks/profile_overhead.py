"""What sampling costs a job: the same work with and without a recorder on its host, in turn.

    python -m benchmarks.profile_overhead --rounds 10 --append docs/benchmarks.md

The work keeps every core busy with a fixed number of matrix products, one process a core, as a training does. Each
round does it once without a recorder and once beside one, the order turned from round to round. Compared are
the wall time, and the CPU time of the work alone, which others on the machine do not lengthen; the slowdown is the
median of the rounds' ratios. Where there is a card, the same again with products on it. The recorder is that of
``profile record``: an actor of a Ray that runs all the while, at 10 samples a second, which exports its readings. Its
own CPU time is what it writes down: of its sampling threads, and of its whole process, where imports and Ray's threads
count too.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import heading, table, write_down
from profiling.cluster_recording import ClusterRecording
from profiling.recorder import HERTZ
from workbench.files import read_json
from workbench.session import connect


@dataclass(frozen=True)
class Cost:
    """Seconds by the wall, and of CPU in all processes of the work."""

    wall: float
    cpu: float


def burn(products: int) -> float:
    """So many products of two small matrices, on one core; the CPU seconds that they took."""
    square = np.random.default_rng(0).random((192, 192))
    begun = time.process_time()
    for _ in range(products):
        square = square @ square
        square /= square.max()
    return time.process_time() - begun


def on_cores(products: int) -> Cost:
    """``burn`` on every core at once."""
    cores = multiprocessing.cpu_count()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(burn, [1] * cores, chunksize=1)  # every process is up
        begun = time.perf_counter()
        spent = pool.map(burn, [products] * cores, chunksize=1)
        return Cost(time.perf_counter() - begun, sum(spent))


def on_card(products: int) -> Cost:
    """Products of large matrices on the first card."""
    import torch

    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begun, spent = time.perf_counter(), time.process_time()
    for _ in range(products):
        square = torch.nn.functional.normalize(square @ square)
    torch.cuda.synchronize()
    return Cost(time.perf_counter() - begun, time.process_time() - spent)


def recorded(work: Callable[[], Cost]) -> tuple[Cost, tuple[float, float]]:
    """``work`` beside a recorder; what sampling took of a core, and the process that samples, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        recording = ClusterRecording(Path(folder), HERTZ, export=True)
        took = work()
        recording.stop()
        [facts] = [read_json(file) for file in Path(folder).glob("*/host.json")]
    spent = facts["sampler_cpu_seconds"], facts["sampler_process_cpu_seconds"]
    return took, (100 * spent[0] / facts["sampler_wall_seconds"], 100 * spent[1] / facts["sampler_wall_seconds"])


def compare(name: str, work: Callable[[], Cost], rounds: int) -> dict[str, str]:
    """A row of the table: medians and quartiles of both ratios, and the recorder's own share."""
    work()
    wall, cpu, shares, alone = [], [], [], []
    for number in range(rounds):
        if number % 2:
            (beside, share), plain = recorded(work), work()
        else:
            plain, (beside, share) = work(), recorded(work)
        wall.append(100 * (beside.wall / plain.wall - 1))
        cpu.append(100 * (beside.cpu / plain.cpu - 1))
        shares.append(share)
        alone.append(plain.wall)
    return {
        "work": name,
        "alone": f"{statistics.median(alone):.1f} s",
        "wall time": _spread(wall),
        "CPU time of the work": _spread(cpu),
        "sampling, of one core": f"{statistics.median(share for share, _ in shares):.2f}%",
        "its process": f"{statistics.median(share for _, share in shares):.2f}%",
    }


def _spread(percents: list[float]) -> str:
    low, middle, high = statistics.quantiles(percents, n=4)
    return f"{middle:+.1f}% ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Print the table, and append it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--products", type=int, default=8000, help="of each process in a round")
    parser.add_argument("--card-products", type=int, default=40_000, help="in a round, where there is a card")
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 rounds at least")
    import torch

    with connect():
        rows = [compare("products on every core", lambda: on_cores(options.products), options.rounds)]
        if torch.cuda.is_available():
            rows.append(compare("products on a card", lambda: on_card(options.card_products), options.rounds))
    title = heading(f"Sampling at {HERTZ:g} Hz beside work", ["psutil", "numpy"])
    note = f"{options.rounds} rounds; medians, and quartiles in brackets."
    write_down(f"{title}\n{note}\n\n{table(rows)}", options.append)


if __name__ == "__main__":
    main()
