"""One driver a sweep: a second one would give its trials to other processes and write into the same study."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import UserError
from workbench.runs import run_id

LOCK = "driver.lock"


@contextmanager
def sole_driver(folder: Path) -> Iterator[None]:
    """Drive the sweep in ``folder`` alone. The lock ends with the process, however it ends.

    Raises UserError where another process drives it.
    """
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_id(folder)} is running: another command drives it") from None
        yield


def is_driven(folder: Path) -> bool:
    """Whether a process of this host, or one that shares the storage's locks, drives the sweep in ``folder``."""
    if not (folder / LOCK).exists():
        return False
    try:
        with sole_driver(folder):
            return False
    except UserError:
        return True
