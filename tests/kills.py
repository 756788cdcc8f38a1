"""Random kills for tests: how many rounds, from which seed, and which process.

    KILL_ROUNDS=20 KILL_SEED=7 .venv/bin/python -m pytest tests/integration/test_milvus_server.py

``make soak`` sets them. A failed test shows its seed and the moments of its kills.
"""

import os
import random
import time
from collections.abc import Callable

import psutil

ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
SEED = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(1_000_000))


def dice(name: str, number: int) -> random.Random:
    """The random numbers of one round, which its seed fixes; the seed is printed."""
    print(f"round {number} of '{name}': KILL_SEED={SEED}")
    return random.Random(f"{SEED} {name} {number}")


def found(pid: int, words: str) -> list[psutil.Process]:
    """The running descendants of process ``pid`` whose command line has ``words`` in it."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    matching = []
    for process in descendants:
        try:
            if words in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                matching.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return matching


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds. Raises AssertionError saying ``what`` did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
