"""A port of this machine's loopback that ends on a port of a host's loopback, through ssh.

    with tunnel(Remote(head), 8265) as port:
        print(f"http://127.0.0.1:{port}")

ssh runs ``cat`` there, which reads from us: however we end, it sees its input close and the tunnel ends with us.
"""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.ssh import Remote
from workbench.errors import Failure

OPEN_SECONDS = 20
READY = "workbench-tunnel-open"


@contextmanager
def tunnel(remote: Remote, port: int) -> Iterator[int]:
    """Keep the tunnel for the block; yields the local port. Raises Failure if ssh cannot open it."""
    local = free_port()
    process = open_tunnel(remote, port, local)
    try:
        yield local
    finally:
        close(process)


def open_tunnel(remote: Remote, port: int, local: int) -> "subprocess.Popen[str]":
    """Start ssh and wait until ``local`` is forwarded. Raises Failure with what ssh said if it is not."""
    forward = ["-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{local}:127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*remote.ssh(), *forward, remote.name(), f"echo {READY} && exec cat >/dev/null"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
    )  # fmt: skip
    impatience = threading.Timer(OPEN_SECONDS, process.kill)
    impatience.start()
    assert process.stdout is not None and process.stderr is not None
    opened = any(line.strip() == READY for line in iter(process.stdout.readline, ""))
    impatience.cancel()
    if not opened:
        process.wait()
        said = process.stderr.read().strip().splitlines()[-1:] or [f"no answer within {OPEN_SECONDS} s"]
        raise Failure(f"no tunnel to {remote.name()}: {said[0]}")
    return process


def close(process: "subprocess.Popen[str]") -> None:
    """End the tunnel."""
    process.terminate()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
