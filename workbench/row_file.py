"""Files of rows, a JSON mapping a line, that are added to while a run goes on, whatever kills it or fills its disk."""

import io
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

BLOCK = 4096
"""Bytes that are read at a time to find the last whole line."""


class RowFile:
    """Rows that a run can do without: what cannot be written is told on stderr, once, and later rows are tried again.

    Nothing is made before the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = False

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append ``rows``, all or none of them."""
        try:
            append_rows(self.path, rows)
        except OSError as error:
            if not self._told:
                print(f"{self.path} takes no rows at present: {error.strerror}", file=sys.stderr, flush=True)
            self._told = True


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append ``rows`` to the file at ``path`` after its last whole line: half a line, left by a kill, is cut off.

    Raises OSError where they cannot be written, and takes back what was written of them.
    """
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab+", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        if end > (whole := _end_of_lines(stream, end)):
            stream.truncate(whole)
        append_whole(stream, data)


def append_whole(stream: io.FileIO, data: bytes) -> None:
    """Write ``data`` at the end of ``stream``. Raises OSError, where it takes back what was written of it."""
    end = stream.seek(0, os.SEEK_END)
    left = memoryview(data)
    try:
        while left:
            left = left[stream.write(left) :]
    except OSError:
        with suppress(OSError):
            stream.truncate(end)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file at ``path``, oldest first; none where there is no file. Half a line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _end_of_lines(stream: io.FileIO, end: int) -> int:
    """Where the last line that has its newline ends, in a file of ``end`` bytes."""
    while end:
        start = max(0, end - BLOCK)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
