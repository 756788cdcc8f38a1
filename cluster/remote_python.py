"""Run one of our own scripts in a host's Python, over ssh, without installing anything there.

    facts = run_script(remote, PROBE, {"folder": "~/.workbench"})
    with Conversation(remote, TRIAL) as host:
        host.ask("clock")

A script is one file of the standard library alone; it travels through ssh's input.
"""

import contextlib
import json
import queue
import shlex
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.ssh import Remote, remote_path
from workbench.errors import Failure

PROBE = Path(__file__).with_name("probe.py")
TRIAL = Path(__file__).with_name("host_trial.py")
PEER_COPY = Path(__file__).with_name("peer_copy.py")

FIND_PYTHON = """for python in "$@"; do
  [ "$python" = -- ] && break
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null && found=$python && break
done
while [ "$1" != -- ]; do shift; done; shift
[ -n "${found-}" ] || { echo "no Python 3.8 or newer here: install python3" >&2; exit 127; }
exec "$found" "$@" """
"""Replaces itself by the first Python that is new enough of those named before ``--``, with the arguments after it."""

USUAL = ["python3", "/usr/bin/python3", "/opt/homebrew/bin/python3", "/usr/local/bin/python3"]


def python_command(interpreters: list[str], arguments: list[str]) -> str:
    """A line for any login shell that runs the first usable of ``interpreters`` with ``arguments``."""
    words = " ".join([*map(remote_path, interpreters), "--", *map(shlex.quote, arguments)])
    return f"exec sh -c {shlex.quote(FIND_PYTHON)} sh {words}"


def run_script(remote: Remote, script: Path, asked: dict[str, Any], *, python: str = "", timeout: float = 90) -> Any:
    """What ``script`` printed, parsed from JSON. ``python`` is the one interpreter to use, any if not given.

    Raises Failure if the host does not answer or the script fails.
    """
    interpreters = [python] if python else [*USUAL, remote.host.python]
    command = python_command(interpreters, ["-", json.dumps(asked)])
    done = remote.run(command, stdin=script.read_text(), timeout=timeout)
    return parse(done.stdout, remote)


def parse(printed: str, remote: Remote) -> Any:
    """The JSON on the last line; a login script may print before it. Raises Failure if there is none."""
    try:
        return json.loads(printed.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise Failure(f"{remote.host.address} printed no JSON: {printed.strip()[-200:] or 'nothing'}") from None


class Conversation:
    """A script that keeps running on a host and answers requests, a line of JSON each."""

    def __init__(self, remote: Remote, script: Path, *, interpreters: list[str] | None = None) -> None:
        source = script.read_bytes()
        loader = f"import sys; exec(compile(sys.stdin.buffer.read({len(source)}), {script.name!r}, 'exec'))"
        command = python_command(interpreters or [*USUAL, remote.host.python], ["-c", loader])
        self._remote = remote
        self._answers: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            remote.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(source)

    def ask(self, do: str, *, timeout: float = 60, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises Failure if there is none in time or the host could not do it."""
        self._send(json.dumps({"do": do, **request}).encode() + b"\n")
        try:
            while (line := self._answers.get(timeout=timeout)) and not line.startswith("{"):
                continue  # what a login script prints
        except queue.Empty:
            raise Failure(f"{self._remote.host.address} did not answer within {timeout:g} s") from None
        if not line:
            raise Failure(self._complaint())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the script, which takes back all it did."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line.decode(errors="replace"))
        self._answers.put("")

    def _complaint(self) -> str:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip()
        return said.splitlines()[-1] if said else f"{self._remote.host.address} hung up"
