"""Our application inside Ray Serve: start it, look at it, take it down; other applications are left alone."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION = "workbench"
LOG_PREFIX = re.compile(r"^\([^)]*pid=\d+\) [A-Z]+ \S+ \S+ \[[^\]]*\] ?", re.MULTILINE)
EXCEPTION = re.compile(
    r"^((?:\w+\.)*\w*(?:Error|Exception): .+"  # the exception's line
    r"(?:\n(?![ \t]+(?:File |[\^~]))[ \t]+.+){0,4})",  # a pydantic error tells its reason in indented lines below
    re.MULTILINE,
)


@dataclass(frozen=True)
class Deployed:
    """What Serve knows of our application: its status, and each deployment's status, message and replicas."""

    status: str
    message: str
    route_prefix: str
    deployments: dict[str, dict[str, Any]]

    def engine_workers(self) -> dict[str, str]:
        """Worker id to node id of the replicas that hold an engine, those that died of late among them."""
        return {worker: node for name in self.models() for worker, node in self.workers_of(name).items()}

    def workers_of(self, model: str) -> dict[str, str]:
        """The same of one model."""
        deployment = self.models()[model]
        replicas = [*deployment["replicas"], *(deployment.get("recent_dead_replicas") or [])]
        return {r["worker_id"]: r["node_id"] for r in replicas if r.get("worker_id")}

    def models(self) -> dict[str, dict[str, Any]]:
        """The deployments that hold an engine, by model name."""
        return {name.split(":", 1)[1]: d for name, d in self.deployments.items() if ":" in name}

    def roles(self) -> dict[str, str]:
        """What each model is for: ``chat`` or ``embedding``."""
        return {name.split(":", 1)[1]: name.split(":", 1)[0] for name in self.deployments if ":" in name}


def _client() -> Any:
    """Serve's client on this cluster, or None where Serve is not running."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def deployed() -> Deployed | None:
    """Our application on the connected cluster, or None."""
    client = _client()
    found = client.get_serve_details()["applications"].get(APPLICATION) if client else None
    if found is None:
        return None
    return Deployed(str(_text(found["status"])), found["message"], found["route_prefix"] or "/", found["deployments"])


def _text(status: Any) -> str:
    return str(getattr(status, "value", status))


def address() -> tuple[str, int] | None:
    """The host and port that Serve's proxy listens on, or None where Serve is not running."""
    client = _client()
    return (client.http_config.host, client.http_config.port) if client else None


def start_proxy(host: str, port: int) -> None:
    """Start Serve with its proxy on ``host:port``.

    Raises UserError if Serve already listens elsewhere (it cannot be moved) or the port is taken.
    """
    from ray import serve

    if (running := address()) is not None:
        if running != (host, port):
            raise UserError(
                f"Ray Serve already listens on {running[0]}:{running[1]} of this cluster and cannot be moved: "
                f"give host={running[0]} port={running[1]}, or take Serve down first"
            )
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another port=NUMBER") from None
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})


def deploy(application: "Application", route_prefix: str) -> None:
    """Hand the application to Serve without waiting for it.

    Raises UserError if another application already has the route.
    """
    from ray import serve
    from ray.serve.api import RunTarget

    client = _client()
    for name, other in (client.get_serve_details()["applications"] if client else {}).items():
        if name != APPLICATION and other["route_prefix"] == route_prefix:
            raise UserError(f"the application '{name}' already answers at {route_prefix}: give route_prefix=/NAME")
    serve.run_many([RunTarget(application, APPLICATION, route_prefix)], wait_for_applications_running=False)


def remove() -> bool:
    """Delete our application, and Serve itself where nothing else runs in it. True if there was one."""
    from ray import serve

    client = _client()
    if client is None:
        return False
    there = deployed() is not None
    if there:
        serve.delete(APPLICATION)
    if not client.get_serve_details()["applications"]:
        serve.shutdown()
    return there


def engine_log(workers: dict[str, str], lines: int = 400) -> str:
    """The last lines that each of these replicas and its engine wrote; empty for those whose node is gone.

    Read by a task on the replica's node: the State API asks the dashboard's agents, which may not be there yet.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    read = ray.remote(num_cpus=0, max_retries=0)(_worker_log)
    texts = []
    for worker, node in sorted(workers.items()):
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        try:
            texts.append(ray.get(read.options(scheduling_strategy=place).remote(worker, lines), timeout=60))
        except RayError as error:
            texts.append(f"(the log of worker {worker} cannot be read: {type(error).__name__})\n")
    return "".join(texts)


def _worker_log(worker: str, lines: int) -> str:
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = sorted(folder.glob(f"worker-{worker}-*.out")) + sorted(folder.glob(f"worker-{worker}-*.err"))
    tails = (file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:] for file in files)
    return "".join(f"{line}\n" for tail in tails for line in tail)


def causes(log: str, most: int = 3) -> list[str]:
    """The exceptions a log names (``SomeError: text``), in order, each once, but none that only points elsewhere."""
    found = [match[1].strip() for match in EXCEPTION.finditer(LOG_PREFIX.sub("", log))]
    pointers = ("See root cause above", "Traceback (most recent call last)")
    return [text for text in dict.fromkeys(found) if not any(pointer in text for pointer in pointers)][:most]
