"""A Milvus Lite folder, which one process may open: it writes ``holder.json`` there, so that who comes too late is told
who has it."""

import datetime
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.files import read_json, write_json


class LiteFolder:
    """An open folder, answering pymilvus on ``address``; close it, or it stays locked until the process ends.

    Raises UserError naming the holder if another process still has the folder after ``wait`` seconds.
    """

    def __init__(self, folder: Path, wait: float = 0) -> None:
        from milvus_lite.adapter.grpc.server import start_server_in_thread
        from milvus_lite.exceptions import DataDirLockedError

        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait
        while True:
            try:
                self._server, self._database, port = start_server_in_thread(
                    data_dir=str(folder), host="127.0.0.1", port=0
                )
                break
            except DataDirLockedError:
                if time.monotonic() > deadline:
                    raise UserError(f"uri: {folder} is in use: {describe_holder(folder)}") from None
                time.sleep(0.2)
        self.address = f"http://127.0.0.1:{port}"
        holder: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process": " ".join(sys.argv)[:200],
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / "holder.json", holder)

    def close(self) -> None:
        """Flush what was written and let the folder go."""
        (self._folder / "holder.json").unlink(missing_ok=True)
        self._server.stop(grace=2)
        self._database.close()


def is_lite_folder(folder: Path) -> bool:
    """Whether Milvus Lite has written there."""
    return (folder / "databases").is_dir() or (folder / "collections").is_dir()


def describe_holder(folder: Path) -> str:
    """Who has the folder open, in words."""
    try:
        holder = read_json(folder / "holder.json")
    except (OSError, ValueError):
        return "another process has it open, and has not said who it is"
    return (
        f"process {holder['pid']} on {holder['host']} has had it open since {holder['since']} "
        f"({holder['process']}); wait for it to end, or stop it"
    )
