"""A gateway of its own process before engines that misbehave, for tests: real processes, over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).parent
SERVE = """
import json, socket, sys
from serve.gateway.settings import GatewayConfig
from serve.gateway.standalone import serve
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
serve(GatewayConfig(**json.loads(sys.argv[2])), listener)
"""
SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Server:
    """A process that listens."""

    url: str
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def seen(self) -> dict[str, Any]:
        """What a bad engine has seen."""
        return dict(httpx.get(f"{self.url}/seen", timeout=SECONDS).json())


def started(command: list[str], port: int, log: Path | None = None) -> "contextlib.AbstractContextManager[Server]":
    """A Python process of our own that answers at ``port``, killed at the end."""
    return started_program([sys.executable, *command], port, log)


@contextlib.contextmanager
def started_program(command: list[str], port: int, log: Path | None = None) -> Iterator[Server]:
    """A process of our own that answers at ``port``, killed at the end."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else subprocess.DEVNULL
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
        try:
            deadline = time.monotonic() + SECONDS
            while not listens(port):
                assert process.poll() is None, log.read_text() if log else "it ended"
                assert time.monotonic() < deadline, "it does not listen"
                time.sleep(0.05)
            yield Server(f"http://127.0.0.1:{port}", process)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def bad_engine(port: int | None = None) -> Iterator[Server]:
    """An engine that misbehaves on purpose."""
    port = port or free_port()
    with started([str(TESTS / "bad_engine.py"), str(port)], port) as server:
        yield server


@contextlib.contextmanager
def gateway(settings: dict[str, Any], log: Path | None = None) -> Iterator[Server]:
    """A gateway with these settings."""
    port = free_port()
    with started(["-c", SERVE, str(port), json.dumps(settings)], port, log) as server:
        httpx.get(f"{server.url}/health", timeout=SECONDS)  # it listens before it can answer
        yield server
