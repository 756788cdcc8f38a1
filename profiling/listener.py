"""The recorder's end of ``workbench.marks``: what processes of this host say while it listens."""

import json
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.marks import sockets_folder

MOST_BYTES = 65536


class MarkListener:
    """Collects marks in a thread from its construction until ``close``. Raises UserError where it cannot listen."""

    def __init__(self) -> None:
        folder = sockets_folder()
        self._path = folder / secrets.token_hex(6)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to somebody else")
            self._socket.bind(str(self._path))
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"no recorder can listen in {folder} ({error}): let WORKBENCH_MARKS name a folder of your own, by a "
                "short path"
            ) from None
        self._heard: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._last, self._cleared = secrets.token_bytes(16), False
        self._thread = threading.Thread(target=self._listen, name="marks", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data = self._socket.recv(MOST_BYTES)
            if data == self._last or (self._cleared and not data):
                return
            try:
                message = json.loads(data)
            except ValueError:
                continue
            with self._lock:
                self._heard.append(message)

    def take(self) -> list[dict[str, Any]]:
        """What was heard since the last call."""
        with self._lock:
            heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        """Listen no more; what was heard can still be taken."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            try:
                last.sendto(self._last, str(self._path))
            except OSError:  # somebody has cleared the folder away
                self._cleared = True
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)


def append_marks(file: Path, marks: list[dict[str, Any]]) -> None:
    """Add marks to a file of JSON lines; a reader may meet the last line cut off."""
    if marks:
        with file.open("a") as lines:
            lines.write("".join(json.dumps(mark) + "\n" for mark in marks))
