"""The folder of a Ray that we start: sockets, logs, spilled objects. It ends with its owner, or at the next start."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "wb-"  # short: Ray's socket paths must stay under 107 characters
LOCK = "owner.lock"
ENDING_SECONDS = 10.0


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A new folder that this process owns for the block; those whose owners were killed are removed first."""
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix="new"))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # not inherited: a child cannot hold it for us
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(PREFIX + folder.name.removeprefix("new")))  # seen by others only locked
    try:
        yield folder
    finally:
        _end_processes_of(folder)
        _remove(folder)
        os.close(lock)


def _end_processes_of(folder: Path) -> None:
    """Kill our descendants that were told of ``folder``: a Ray whose start was interrupted ends its own only as this
    process exits, and until then they would write to it again."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(str(folder) in argument for argument in child.cmdline()):
                child.kill()


def _remove(folder: Path) -> None:
    """Remove ``folder``, in which processes that are just ending may still write."""
    deadline = time.monotonic() + ENDING_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def remove_abandoned() -> None:
    """Remove the folders whose owner is dead: a lock says so across containers, where a process id would not."""
    for file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            lock = os.open(file, os.O_RDWR)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _remove(file.parent)
        finally:
            os.close(lock)
