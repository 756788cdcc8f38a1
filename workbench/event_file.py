"""TensorBoard's file of scalars, written by whoever logs them.

tensorboardX would write it in a thread of its own, which a full disk ends; the queue before it fills, and who logs next
waits for ever.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.row_file import append_whole


class EventFile:
    """A new file of events in ``folder``; with ``first_step`` TensorBoard forgets the steps from there on that it read
    in older ones. Raises OSError."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        again = "" if first_step is None else f".from-{first_step}"
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}{again}"
        self._stream = (folder / name).open("wb", buffering=0)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record ``scalars`` at ``step``. Raises OSError."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._add(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def close(self) -> None:
        """No more scalars."""
        self._stream.close()

    def _add(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(each)) for each in (size, data)]
        append_whole(self._stream, size + sums[0] + data + sums[1])
