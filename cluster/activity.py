"""What a cluster is doing: its live nodes, and which jobs hold which of its hosts, asked of the dashboard.

activity = observe(cluster)
activity.jobs_on({"linux-box"})      # jobs that would suffer if that host's Ray restarted
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.job_client import job_client
from cluster.job_spec import EXEC
from cluster.labels import HOST
from workbench.errors import Failure
from workbench.session import ClusterAddress

ALL: dict[str, Any] = {"timeout": 20, "limit": 10_000, "raise_on_missing_output": False}
"""A head that came back with its state counts the nodes of before as missing from the answer, and would raise."""

AT_WORK = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class LiveNode:
    """A raylet that the control store counts as alive; ``started`` is in seconds of that host's own clock."""

    node_id: str
    host: str
    started: float


@dataclass(frozen=True)
class JobAtWork:
    """A job that has not ended: its id, what was typed, and the hosts where its driver, actors or tasks are."""

    job: str
    command: str
    hosts: frozenset[str]


@dataclass(frozen=True)
class Activity:
    """Live nodes and jobs at work at one moment."""

    nodes: list[LiveNode] = field(default_factory=list)
    jobs: list[JobAtWork] = field(default_factory=list)

    def jobs_on(self, hosts: Iterable[str]) -> list[JobAtWork]:
        """The jobs that have something on one of ``hosts``."""
        wanted = set(hosts)
        return [job for job in self.jobs if job.hosts & wanted]


def live_nodes(cluster: ClusterAddress) -> list[LiveNode]:
    """The live nodes. Raises Failure where the dashboard does not answer, UserError if it refuses the token."""
    job_client(cluster)  # refuses a wrong token, and sets ours for the State API
    from ray.util.state import list_nodes

    try:
        with _silent():
            states = list_nodes(cluster.dashboard, filters=[("state", "=", "ALIVE")], detail=True, **ALL)
    except Exception as error:
        raise Failure(f"{cluster.dashboard} does not tell its nodes: {error}") from None
    return [
        LiveNode(state.node_id, (state.labels or {}).get(HOST, state.node_name), (state.start_time_ms or 0) / 1000)
        for state in states
    ]


def observe(cluster: ClusterAddress, head: str) -> Activity:
    """Nodes and jobs at work; ``head`` names the host that keeps the jobs that have no driver yet.

    Raises Failure or UserError as ``live_nodes``.
    """
    nodes = live_nodes(cluster)
    host_of = {node.node_id: node.host for node in nodes}
    client = job_client(cluster)
    try:
        at_work = [job for job in client.list_jobs() if str(job.status.value) in AT_WORK]
        places = _places(cluster) if at_work else {}
    except Exception as error:
        raise Failure(f"{cluster.dashboard} does not tell its jobs: {error}") from None
    jobs = []
    for job in at_work:
        ids = places.get(job.job_id or "", set()) | {job.driver_node_id or ""}
        hosts = {host_of[one] for one in ids if one in host_of}
        name = job.submission_id or f"driver {job.job_id}"
        jobs.append(JobAtWork(name, (job.entrypoint or "").removeprefix(EXEC), frozenset(hosts or {head})))
    return Activity(nodes, jobs)


def _places(cluster: ClusterAddress) -> dict[str, set[str]]:
    """The nodes on which each Ray job has live actors or running tasks."""
    from ray.util.state import list_actors, list_tasks

    places: dict[str, set[str]] = {}
    with _silent():
        actors = list_actors(cluster.dashboard, filters=[("state", "=", "ALIVE")], **ALL)
        tasks = list_tasks(cluster.dashboard, filters=[("state", "=", "RUNNING")], **ALL)
    for one in (*actors, *tasks):
        if one.node_id:
            places.setdefault(one.job_id, set()).add(one.node_id)
    return places


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the State API's warnings about answers that were cut short."""
    import warnings

    logging.getLogger("ray.util.state").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
