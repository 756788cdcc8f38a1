"""Attach to the cluster that is named, or start a local Ray; token authentication in both.

    with connect():
        ray.get(task.remote())

The cluster is, in this order: the one of the Ray job we run in or ``RAY_ADDRESS``; the local head that
``workbench demo`` or ``workbench cluster local`` keeps running for this checkout; a Ray of our own that ends with us.
"""

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.config import CHECKOUT
from workbench.errors import UserError
from workbench.files import read_json
from workbench.ray_files import ray_folder

NAMESPACE = "workbench"

LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""The address of a node of our own. Ray replaces 127.0.0.1 by the host's address on Linux, and then its agents listen
on the network and a laptop that changes networks loses its cluster."""

PROBE_SECONDS = 5.0
"""How long a named cluster may take to accept a connection."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that asked for no card sees none
    "RAY_JOB_START_TIMEOUT_SECONDS": str(30 * 24 * 3600),  # a job may wait for a card; Ray gives up after 15 minutes
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": "20",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_ERROR_REPORTING": "false",
}
"""Set for every Ray process of ours: no telemetry, today's defaults, no warnings about tomorrow's."""


@dataclass(frozen=True)
class ClusterAddress:
    """How a cluster is reached: ``gcs`` (host:port) by drivers, empty where only jobs reach it; ``dashboard``
    (http://...) by jobs; the token file; the cluster's runs root where it is not ours; and whether it is elsewhere."""

    gcs: str
    dashboard: str
    token_file: Path | None
    runs_root: Path | None = None
    remote: bool = False


def state_folder() -> Path:
    """The folder of this checkout's token and running head: ``$WORKBENCH_STATE``, or ``.workbench/``."""
    return Path(os.environ.get("WORKBENCH_STATE") or CHECKOUT / ".workbench")


def session_file() -> Path:
    """Where the running head of this checkout is written down."""
    return state_folder() / "cluster.json"


def token_environment(token_file: Path) -> dict[str, str]:
    """The variables that turn on Ray's token authentication with the token in ``token_file``."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def use_cluster(cluster: ClusterAddress) -> None:
    """Point this process's Ray clients at ``cluster``: its token, and its job API over any other the shell names."""
    if cluster.token_file is not None:
        os.environ.update(token_environment(cluster.token_file))
    os.environ["RAY_API_SERVER_ADDRESS"] = cluster.dashboard


def make_token(token_file: Path) -> Path:
    """Create ``token_file`` with a random token, readable by its owner alone; an existing one is kept."""
    token_file.parent.mkdir(parents=True, exist_ok=True)
    if not token_file.exists():
        descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    token_file.chmod(0o600)
    return token_file


def local_cluster() -> ClusterAddress | None:
    """The head that this checkout keeps running, or keeps a tunnel to, on loopback; None where there is neither, or
    only the session file of a process that has ended."""
    try:
        session = read_json(session_file())
        os.kill(session["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    token, runs = session["token_file"], session.get("runs_root")
    return ClusterAddress(
        session["gcs"],
        session["dashboard"],
        Path(token) if token else None,
        Path(runs) if runs else None,
        bool(session.get("remote")),
    )


def dashboard_address(given: str | None = None) -> ClusterAddress:
    """The cluster that jobs go to: ``given``, ``RAY_API_SERVER_ADDRESS``/``RAY_ADDRESS`` (http), or the local head.

    Raises UserError if no cluster is named and none runs here.
    """
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        token = os.environ.get("RAY_AUTH_TOKEN_PATH")
        return ClusterAddress("", address.rstrip("/"), Path(token) if token else None)
    if given:
        raise UserError(f"'{given}' is not a job address: give http://HOST:PORT of the cluster's dashboard")
    if (local := local_cluster()) is not None:
        return local
    raise UserError(
        "no cluster is named or runs here: start one with 'workbench cluster local', "
        "or name one with --address http://HOST:8265 or RAY_API_SERVER_ADDRESS"
    )


def hosts() -> list[dict[str, Any]]:
    """The live machines of the connected cluster: name, resources (cards too) and labels."""
    import ray

    return [
        {
            "host": node["NodeManagerHostname"],
            "resources": {k: v for k, v in sorted(node["Resources"].items()) if not k.startswith("node:")},
            "labels": dict(sorted(node.get("Labels", {}).items())),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def connect(dashboard: bool = True) -> Iterator[bool]:
    """Hold a connection to Ray for the block, yielding whether it is our own; then it ends with it, its files too.

    One of our own has no ``dashboard`` where nobody needs it.
    """
    with attach() as attached:
        if attached:
            yield False
            return
    with _own_ray(dashboard):
        yield True


@contextmanager
def attach() -> Iterator[bool]:
    """Hold a connection to the cluster that is named or kept running, yielding False, at once, if there is none.

    Raises UserError if the named one does not answer.
    """
    import ray  # heavy, and reads the variables set below

    if ray.is_initialized():
        yield True
        return
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # Ray would ask that cluster's State API about this one's actors
    address, origin = os.environ.get("RAY_ADDRESS"), "which RAY_ADDRESS names"
    if not address and (local := local_cluster()) is not None and local.token_file is not None:
        _use_token(local.token_file)
        address = local.gcs
        origin = f"the head that {session_file()} names; stop its process, or delete the file if the head is gone"
    if address and not address.startswith("http"):
        _probe(address, origin)
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}") from None
        try:
            yield True
        finally:
            ray.shutdown()
        return
    yield False


def _probe(address: str, origin: str) -> None:
    """Raise UserError if nobody listens at ``address`` (``host:port``, or ``ray://host:port``): Ray would try for ten
    minutes. The words by which Ray looks for a cluster itself (``auto``, ``local``) are left to it."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"'{address}', {origin}: an address is HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}), {origin}") from None


def _use_token(token_file: Path) -> None:
    """Turn on token authentication in this process, whose Ray may have read its variables when it was imported."""
    from ray._raylet import Config

    os.environ.update(token_environment(token_file))
    Config.initialize("")


@contextmanager
def _own_ray(dashboard: bool) -> Iterator[None]:
    import ray

    _use_token(make_token(state_folder() / "auth_token"))
    print("starting a local Ray for this command", file=sys.stderr)
    with ray_folder() as folder:
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                _node_ip_address=LOOPBACK,
                object_store_memory=object_store_bytes(),
                log_to_driver=False,
                _temp_dir=str(folder),
            )
            yield
        finally:
            ray.shutdown()


def object_store_bytes() -> int:
    """A modest object store: a tenth of memory, at most 2 GiB (macOS allows no more) and at least 256 MiB."""
    import psutil

    return int(min(2 << 30, max(256 << 20, psutil.virtual_memory().total // 10)))
