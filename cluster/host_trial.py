"""What only a try can tell, done on a host: a clock, ports that open, connections that arrive, bytes that are shared.

It runs under any Python from 3.8 on with the standard library alone (and pyarrow for ``s3://``). Each line of its
input is a JSON request, each line of its output the answer. When the input ends, or after ``LONGEST_SECONDS``, it
closes every port that it opened and removes every file that it wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 180
CONNECT_SECONDS = 3.0
BYTES = 1 << 20

listeners: list[socket.socket] = []
written: list[tuple[str, str, str]] = []


def clock() -> dict[str, Any]:
    """Seconds since the epoch by this host's clock."""
    return {"epoch": time.time()}


def listen(address: str, ports: list[int], word: str) -> dict[str, Any]:
    """Answer ``word`` on each of ``ports`` at ``address``; ``taken`` are those that something else listens on."""
    found: dict[str, Any] = {"opened": [], "taken": [], "refused": {}}
    family, _, _, _, place = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    for port in ports:
        one = socket.socket(family, socket.SOCK_STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((place[0], port))
            one.listen(16)
        except OSError as error:
            one.close()
            if error.errno == 98 or error.errno == 48:  # in use, on Linux and on macOS
                found["taken"].append(port)
            else:
                found["refused"][port] = error.strerror
            continue
        listeners.append(one)
        found["opened"].append(port)
        threading.Thread(target=answer, args=(one, word), daemon=True).start()
    return found


def answer(listener: socket.socket, word: str) -> None:
    """Say ``word`` to everyone who connects, until the listener is closed."""
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        with caller:
            try:
                caller.settimeout(CONNECT_SECONDS)
                caller.sendall(word.encode())
                caller.recv(1)  # who closes first keeps the port for a minute: let that be the caller's
            except OSError:
                continue


def connect(address: str, ports: list[int], taken: list[int], word: str) -> dict[str, str]:
    """What became of a connection to each port: ``open``, or why not. A port that was ``taken`` need only accept."""
    with ThreadPoolExecutor(max(1, len(ports))) as pool:
        outcomes = pool.map(lambda port: one_connection(address, port, "" if port in taken else word), ports)
        return {str(port): outcome for port, outcome in zip(ports, outcomes)}  # noqa: B905  strict is from 3.10 on


def one_connection(address: str, port: int, word: str) -> str:
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as stream:
            said = b""
            while len(said) < len(word):
                block = stream.recv(len(word) - len(said))
                if not block:
                    break
                said += block
            return "open" if said.decode(errors="replace") == word else "another program answers"
    except socket.timeout:  # noqa: UP041  the same as TimeoutError only from 3.10 on
        return "no answer"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return error.strerror or str(error)


def write(folder: str, name: str, secrets_file: str) -> dict[str, Any]:
    """Write a megabyte of random bytes below ``folder``, and its digest; removed at the end. (An object store may keep
    an empty object of the folder's name.)"""
    content = os.urandom(BYTES)
    if folder.startswith("s3://"):
        system, prefix = bucket(folder, secrets_file)
        written.append((folder, name, secrets_file))
        with system.open_output_stream(f"{prefix}/{name}") as stream:
            stream.write(content)
    else:
        with Path(folder, name).open("xb") as stream:
            written.append((folder, name, secrets_file))
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    return {"digest": hashlib.sha256(content).hexdigest()}


def read(folder: str, name: str, secrets_file: str) -> dict[str, Any]:
    """The digest of the bytes that are there."""
    if folder.startswith("s3://"):
        system, prefix = bucket(folder, secrets_file)
        with system.open_input_stream(f"{prefix}/{name}") as stream:
            content = stream.read()
    else:
        content = Path(folder, name).read_bytes()
    return {"digest": hashlib.sha256(content).hexdigest()}


def bucket(uri: str, secrets_file: str) -> tuple[Any, str]:
    """The object store and the path in it, with this host's own credentials: its secrets file's, or Amazon's chain."""
    from pyarrow import fs

    given = secrets(Path(secrets_file).expanduser())
    endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    options = {
        "access_key": given.get("AWS_ACCESS_KEY_ID"),
        "secret_key": given.get("AWS_SECRET_ACCESS_KEY"),
        "session_token": given.get("AWS_SESSION_TOKEN"),
        "region": given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION"),
        "endpoint_override": endpoint,
    }
    system = fs.S3FileSystem(**{key: value for key, value in options.items() if value}, connect_timeout=5)
    return system, uri[len("s3://") :].rstrip("/")


def secrets(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    pairs = [line.strip().partition("=") for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    return {name.replace("export ", "").strip(): value.strip().strip("'\"") for name, _, value in pairs}


def clean() -> None:
    """Close the ports and remove the files."""
    while listeners:
        listeners.pop().close()
    while written:
        folder, name, secrets_file = written.pop()
        try:
            if folder.startswith("s3://"):
                system, prefix = bucket(folder, secrets_file)
                system.delete_file(f"{prefix}/{name}")
            else:
                Path(folder, name).unlink()
        except OSError:
            continue  # it was never written


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "clock": clock,
    "listen": listen,
    "connect": connect,
    "write": write,
    "read": read,
}


def stop(signum: int, _: object) -> None:
    sys.exit(128 + signum)


def main() -> None:
    """Answer until the input ends."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        for line in iter(sys.stdin.buffer.readline, b""):
            request = json.loads(line)
            try:
                said: Any = REQUESTS[request.pop("do")](**request)
            except Exception as error:  # the caller makes a row of it
                said = {"error": getattr(error, "strerror", None) or str(error) or type(error).__name__}
            print(json.dumps(said), flush=True)
    finally:
        clean()


if __name__ == "__main__":
    main()
