"""SIGTERM and SIGHUP end a command the way Ctrl-C does: by an exception, so that every clean-up runs, and runs once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def catch_signals() -> None:
    """Raise SystemExit(128 + signal) in the main thread on SIGTERM or SIGHUP (unless ``nohup`` ignores the latter).

    Call it again after ``ray.init``, which installs a handler of its own for SIGTERM.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second one must not cut the clean-up short
    sys.exit(128 + signum)


@contextmanager
def one_exit_code() -> Iterator[None]:
    """Give the exit code of SIGTERM to a stop that Ray's own handler turned into another code, during ``ray.init``."""
    try:
        yield
    except SystemExit as stop:
        if stop.code in {128 + signum for signum in SIGNALS}:
            raise
        raise SystemExit(EXIT_TERMINATED) from None
