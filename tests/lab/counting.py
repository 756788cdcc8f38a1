"""A job for the fault tests: slow tasks whose results are acknowledged in a file as they arrive, and added up.

    python counting.py NAME TASKS SECONDS

Each result has an array in the object store, so losing a host can lose results that were acknowledged already; they are
all fetched once more at the end. NAME.starts and NAME.acknowledged are on the shared storage.
"""

import os
import sys
import time
from typing import Any

import numpy as np
import ray

STORAGE = "/srv/storage"


def note(file: str, *words: object) -> None:
    """Append a line in one write."""
    descriptor = os.open(f"{STORAGE}/{file}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.fsync(descriptor)
    os.close(descriptor)


@ray.remote(num_cpus=1, max_retries=5)
def square(name: str, number: int, seconds: float) -> dict[str, Any]:
    """The square of ``number``, after ``seconds``."""
    note(f"{name}.starts", number, os.uname().nodename, f"{time.time():.1f}")
    time.sleep(seconds)
    return {"square": number * number, "ballast": np.full(100_000, number)}


def main(name: str, tasks: int, seconds: float) -> None:
    """Submit, acknowledge as they arrive, fetch all once more, add up."""
    ray.init(log_to_driver=False)
    note(f"{name}.starts", "driver", os.uname().nodename, f"{time.time():.1f}")
    numbers = {square.options(scheduling_strategy="SPREAD").remote(name, n, seconds): n for n in range(tasks)}
    waiting = list(numbers)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=5)
        for ref in ready:
            found = ray.get(ref)
            note(f"{name}.acknowledged", numbers[ref], found["square"])
            del found
        print(f"{len(waiting)} to go", flush=True)
    again = ray.get(list(numbers))
    assert all((one["ballast"] == n).all() for one, n in zip(again, numbers.values(), strict=True))
    print("the sum is", sum(one["square"] for one in again), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
