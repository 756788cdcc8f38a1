"""What a process is doing, said to whoever records this host: a datagram a mark, and nothing where nobody records.

    mark("step", 3, tokens=4096)
    with phase("epoch", 1) as figures:
        figures["tokens"] = 4096

A recorder listens on a socket in ``sockets_folder()``. A mark costs some ten microseconds, is never waited for longer
than ``PATIENCE_SECONDS``, and never fails the work that it tells of.
"""

import contextlib
import itertools
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.config import environment

PATIENCE_SECONDS = 0.05
_numbers = itertools.count()
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Linux' own goes on while the host sleeps, as macOS' CLOCK_MONOTONIC does; Linux' CLOCK_MONOTONIC stands still."""


def steady() -> float:
    """Seconds on a clock that all processes of the host share, that nobody sets, and that goes on while it sleeps."""
    return time.clock_gettime(_STEADY)


def sockets_folder() -> Path:
    """Where recorders of this host and user listen; the host's name is in it, as hosts may share a ``/tmp``.

    ``WORKBENCH_MARKS`` names another folder: to record work apart from the host's other work. Sockets have short paths.
    """
    named = environment("WORKBENCH_MARKS")
    return Path(named or f"/tmp/workbench-marks-{os.getuid()}-{socket.gethostname()}")


def mark(name: str, value: str | float = "", **figures: float) -> None:
    """Say that ``name`` has come to ``value`` now. ``figures`` are what was done since the last one, such as tokens."""
    _send({"kind": "mark", "name": name, "value": value, "figures": numbers(figures)})


@contextlib.contextmanager
def phase(name: str, value: str | float = "", **figures: float) -> Iterator[dict[str, float]]:
    """A stretch of time with a name; figures that are known at its end only are put into what it yields.

    A recorder that came after its beginning hears of that at its end.
    """
    number, began = f"{os.getpid()}.{next(_numbers)}", steady()
    _send({"kind": "begin", "id": number, "name": name, "value": value})
    try:
        yield figures
    finally:
        done = numbers(figures)
        _send({"kind": "end", "id": number, "name": name, "value": value, "figures": done, "began": began})


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those of ``figures`` that are finite numbers, NumPy's and torch's too; nothing else can be added up."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = value if isinstance(value, int) else float(value)
            if math.isfinite(number):
                found[str(name)] = number
    return found


def _send(message: dict[str, Any]) -> None:
    folder = sockets_folder()
    try:
        if folder.stat().st_uid != os.getuid():
            return
        names = os.listdir(folder)
    except OSError:
        return  # nobody records
    now = {"monotonic": steady(), "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    data = json.dumps({**message, **now}, default=str).encode()
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.settimeout(PATIENCE_SECONDS)
            try:
                sender.sendto(data, str(folder / name))
            except ConnectionRefusedError:  # its recorder was killed, or it is no socket: that is somebody's file
                if (folder / name).is_socket():
                    (folder / name).unlink()
