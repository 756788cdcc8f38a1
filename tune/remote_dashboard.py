"""``tune dashboard RUN --cluster``: the pages of a sweep on a cluster, here, through ssh.

The head serves them on its loopback, in a job that is ``tune dashboard`` itself; each port is forwarded, Ray's too. The
job ends with this command.
"""

import contextlib
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.bring_up import reached
from cluster.inventory import Inventory
from cluster.job_client import job_client
from cluster.jobs import ENDED, exit_code, state_of_job, submit
from cluster.ssh import Remote
from cluster.tunnel import tunnel
from workbench.errors import Failure, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PAGE = re.compile(r"^(study|TensorBoard)\s+http://127\.0\.0\.1:(\d+)(\S*)", re.MULTILINE)
"""What ``tune dashboard`` prints of each page."""

START_SECONDS = 180
"""For the job to start and serve: its imports, on a busy head."""


def serve_from(inventory: Inventory, run: str, say: Callable[[str], Any]) -> None:
    """Forward the pages of ``run`` until interrupted, or until the job that serves them ends; ``say`` hears where.

    Raises UserError where the cluster has no such sweep, Failure where ssh or the cluster does not answer.
    """
    head = Remote(inventory.hosts[inventory.head])
    with reached(inventory, open_cluster=inventory.open_cluster) as cluster, contextlib.ExitStack() as tunnels:
        if cluster.runs_root is None:
            raise UserError(f"{inventory.storage} is no folder of the head: its sweeps cannot be shown from here")
        client = job_client(cluster)
        job = submit(client, ["tune", "dashboard", run, "--port", "0"], runs_root=cluster.runs_root)
        try:
            for name, port, path in _pages(client, job):
                local = tunnels.enter_context(tunnel(head, port))
                say(f"{name:<12} http://127.0.0.1:{local}{path}")
            say(f"{'Ray':<12} {cluster.dashboard}")
            if cluster.token_file:
                say(f"Ray's page asks for the token: it is in {cluster.token_file}")
            while state_of_job(client, job) not in ENDED:
                time.sleep(1)
            raise Failure(f"the job {job}, which served the pages, has ended: see 'workbench jobs logs {job}'")
        finally:
            with contextlib.suppress(Exception):  # it may have ended, and the command's own error is what matters
                client.stop_job(job)


def _pages(client: "JobSubmissionClient", job: str) -> list[tuple[str, int, str]]:
    """Name, port of the head's loopback and path of each page that ``job`` serves, once it serves both."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        log = client.get_job_logs(job)
        found = [(name, int(port), path) for name, port, path in PAGE.findall(log)]
        if len(found) == 2:
            return found
        if (code := exit_code(client, job)) is not None:
            said = [line for line in log.splitlines() if line.startswith(("error: ", "failed: "))] or [log[-300:]]
            kind = UserError if code == UserError.exit_code else Failure
            raise kind(f"on the cluster: {said[-1].partition(': ')[2] or said[-1]}")
        time.sleep(0.5)
    raise Failure(f"the job {job} has not served its pages within {START_SECONDS} s: see 'workbench jobs logs {job}'")
