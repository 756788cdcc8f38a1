"""A Ray head on loopback for this checkout: token authentication, the dashboard, and the job API a laptop would use.

    with local_head() as cluster:
        submit(cluster, ["data", "audit"])

``ray start --block`` is the child process; it ends with us, however we end.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.job_client import job_client
from workbench.config import inherited_environment
from workbench.errors import Failure, UserError
from workbench.files import write_json
from workbench.ray_files import ray_folder
from workbench.session import (
    LOOPBACK,
    QUIET,
    ClusterAddress,
    local_cluster,
    make_token,
    object_store_bytes,
    session_file,
    state_folder,
    token_environment,
)

START_SECONDS = 120
PR_SET_PDEATHSIG = 1


@contextmanager
def local_head(cpus: int | None = None) -> Iterator[ClusterAddress]:
    """Start a head, yield its address, and stop every process of it at the end.

    Raises UserError if this checkout already runs one, Failure with Ray's log if it does not come up.
    """
    if (running := local_cluster()) is not None:
        raise UserError(f"this checkout already runs a head at {running.dashboard}; stop that one first (Ctrl-C in it)")
    token_file = make_token(state_folder() / "auth_token")
    with ray_folder() as temp_dir:
        yield from _head_in(temp_dir, token_file, cpus)


def _head_in(temp_dir: Path, token_file: Path, cpus: int | None) -> Iterator[ClusterAddress]:
    log = state_folder() / "head.log"
    gcs, dashboard, *rest = _free_ports(6)
    address = ClusterAddress(f"{LOOPBACK}:{gcs}", f"http://127.0.0.1:{dashboard}", token_file)
    with log.open("w") as stream:
        process = subprocess.Popen(
            _command(gcs, dashboard, rest, temp_dir, cpus),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(token_file),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, in order
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait_until_up(process, address, log)
        write_json(
            session_file(),
            {"pid": process.pid, "gcs": address.gcs, "dashboard": address.dashboard, "token_file": str(token_file)},
        )
        yield address
    finally:
        session_file().unlink(missing_ok=True)
        _stop(process)


def _command(gcs: int, dashboard: int, ports: list[int], temp_dir: Path, cpus: int | None) -> list[str]:
    metrics, agent, agent_grpc, client = ports
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        f"--node-ip-address={LOOPBACK}", f"--port={gcs}", f"--ray-client-server-port={client}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--temp-dir={temp_dir}", f"--object-store-memory={object_store_bytes()}",
    ]  # fmt: skip
    return [*command, f"--num-cpus={cpus}"] if cpus else command


def _environment(token_file: Path) -> dict[str, str]:
    environment = inherited_environment()
    environment |= QUIET | token_environment(token_file)
    # Jobs run "python" of this environment, whether or not it is activated in the user's shell.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment.pop("RAY_ADDRESS", None)
    return environment


def _wait_until_up(process: "subprocess.Popen[bytes]", address: ClusterAddress, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failure(f"the Ray head ended at start-up; its last lines ({log}):\n{_tail(log)}")
        with contextlib.suppress(Exception):
            if _alive_nodes(address):
                return
        time.sleep(0.5)
    raise Failure(f"the Ray head did not answer within {START_SECONDS} s; its last lines ({log}):\n{_tail(log)}")


def _alive_nodes(address: ClusterAddress) -> int:
    job_client(address)  # refuses a wrong token, and sets ours for the State API below
    from ray.util.state import list_nodes

    return len(list_nodes(address.dashboard, filters=[("state", "=", "ALIVE")], timeout=5))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the head and all it started: politely, then by force. Touches no other Ray on this machine."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=5)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
