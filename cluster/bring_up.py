"""Bring the cluster to what its inventory says, and change nothing that is so already.

    plans = make_plans(inventory, files, states, token)
    carry_out(inventory, files, plans, token)

Files are compared by content and permissions, Ray by what it says it was started from. Only a host where one of the
two differs is touched.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cluster import environments
from cluster.activity import Activity, JobAtWork, live_nodes, observe
from cluster.client_state import cluster_address, fingerprint
from cluster.host_state import HostState, on_each, run_script
from cluster.inventory import Inventory
from cluster.render import HostFile, revision
from cluster.ssh import Remote
from cluster.start_script import shell_path
from cluster.supervisors import supervisor
from cluster.tunnel import tunnel
from workbench.errors import Failure, UserError
from workbench.session import ClusterAddress

START_SECONDS = 180
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done on one host, and why Ray must start again there (no reason: it need not)."""

    host: str
    write: list[HostFile] = field(default_factory=list)
    token: bool = False
    install: bool = False
    reasons: list[str] = field(default_factory=list)
    was_running: bool = False

    @property
    def nothing(self) -> bool:
        """Whether the host is as it should be."""
        return not (self.write or self.token or self.install or self.reasons)


def make_plan(inventory: Inventory, name: str, files: list[HostFile], state: HostState, token: str | None) -> Plan:
    """What ``state`` lacks of ``files`` and ``token`` (None: an open cluster).

    Raises UserError if the host's folder belongs to another cluster, or its own environment is missing.
    """
    host = inventory.hosts[name]
    if state.cluster not in ("", inventory.name):
        raise UserError(
            f"{name}: {host.folder} belongs to the cluster '{state.cluster}': give hosts.{name}.folder another path, "
            "or take that one down first"
        )
    if not state.environment and not environments.is_ours(host):
        raise UserError(f"{name}: environment {host.environment} has no bin/python: make it, or leave the key out")
    found = state.files
    write = [
        file for file in files
        if (there := found.get(file.path)) is None or (there.digest, there.mode) != (file.digest, file.mode)
    ]  # fmt: skip
    reasons = [
        f"{file.path} {'is new' if file.path not in found else 'changed'}"
        for file in write
        if file.restarts and (file.path not in found or found[file.path].digest != file.digest)
    ]
    wanted_token = ""
    token_stale = False
    if token is not None:
        there = found.get(inventory.token_file)
        wanted_token = fingerprint(token)
        token_stale = there is None or there.mode != 0o600 or there.digest[:16] != wanted_token
    if not reasons and state.supervisor not in ("active", "starting"):
        reasons.append(f"Ray is {state.supervisor}")
    elif not reasons and state.running[0] != revision(files):
        reasons.append("Ray was started from earlier files")
    if not reasons and token is not None and state.running[1] != wanted_token:
        reasons.append("the token changed")
    install = not state.environment and environments.is_ours(host)
    running = state.supervisor in ("active", "starting")
    return Plan(name, write, token_stale, install, reasons, was_running=running)


def jobs_in_the_way(
    inventory: Inventory, plans: Iterable[Plan], token: str | None, *, head_runs: bool
) -> list[JobAtWork] | None:
    """The jobs that a restart of the planned hosts would hit, or None where a head that runs does not say."""
    restarts = {plan.host for plan in plans if plan.reasons and plan.was_running}
    if not restarts:
        return []
    try:
        with reached(inventory, open_cluster=token is None) as cluster:
            activity: Activity = observe(cluster, inventory.head)
    except (Failure, UserError):
        return None if head_runs else []
    return activity.jobs if inventory.head in restarts else activity.jobs_on(restarts)


@contextlib.contextmanager
def reached(inventory: Inventory, *, open_cluster: bool) -> Iterator[ClusterAddress]:
    """The cluster's job API through a tunnel for the block. Raises Failure if ssh cannot reach the head."""
    with tunnel(Remote(inventory.hosts[inventory.head]), inventory.ports.dashboard) as port:
        yield cluster_address(inventory, port, open_cluster=open_cluster)


def install_environments(inventory: Inventory, plans: Iterable[Plan], say: Say) -> None:
    """Make the missing environments, all hosts at once. Raises Failure if one of them failed."""
    names = [plan.host for plan in plans if plan.install]
    if not names:
        return
    say(f"installing the environment on {', '.join(names)}: some minutes, about 5 GB each")
    _, failed = on_each(names, lambda name: environments.install(Remote(inventory.hosts[name])))
    if failed:
        raise Failure("\n".join(f"{name}: {why}" for name, why in failed.items()))


def write_files(inventory: Inventory, plan: Plan, token: str | None) -> None:
    """Write what the plan says and make the service known to the supervisor. Raises Failure."""
    remote = Remote(inventory.hosts[plan.host])
    if plan.token and token is not None:
        remote.put(inventory.token_file, token, 0o600)
    for file in plan.write:
        remote.put(file.path, file.content, file.mode)
    if plan.reasons:
        run_script(remote, f"set -e\n{supervisor(inventory, plan.host).enable}")


def restart(inventory: Inventory, name: str) -> float:
    """Restart Ray on host ``name``; the time before it, in seconds of the host's clock. Raises Failure."""
    host = inventory.hosts[name]
    script = f"set -e\nrm -f {shell_path(host.folder)}/failures\ndate +%s\n{supervisor(inventory, name).restart}"
    return float(run_script(Remote(host), script).stdout.split()[0])


def restart_hosts(inventory: Inventory, names: list[str], *, open_cluster: bool, say: Say) -> dict[str, float]:
    """Restart Ray on ``names``, the head first and waited for; when each was restarted, by its own clock.

    Raises Failure if the head does not come up.
    """
    times: dict[str, float] = {}
    if inventory.head in names:
        say(f"starting Ray on {inventory.head}, the head")
        times[inventory.head] = restart(inventory, inventory.head)
        wait_until_alive(inventory, {inventory.head: times[inventory.head]}, open_cluster=open_cluster)
    others = [name for name in names if name != inventory.head]
    if others:
        say(f"starting Ray on {', '.join(others)}")
        done, failed = on_each(others, lambda name: restart(inventory, name))
        times |= done
        if failed:
            raise Failure("\n".join(f"{name}: {why}" for name, why in failed.items()))
    return times


def wait_until_alive(inventory: Inventory, since: dict[str, float], *, open_cluster: bool) -> None:
    """Wait until each host of ``since`` has a live raylet that started at or after its time, by its own clock.

    Raises Failure naming the hosts that have none in time, with the end of their logs.
    """
    deadline = time.monotonic() + START_SECONDS
    missing = dict(since)
    while missing and time.monotonic() < deadline:
        with contextlib.suppress(Failure, UserError), reached(inventory, open_cluster=open_cluster) as cluster:
            while missing and time.monotonic() < deadline:
                for node in live_nodes(cluster):
                    if node.host in missing and node.started >= missing[node.host]:
                        del missing[node.host]
                if missing:
                    time.sleep(1)
        if missing:
            time.sleep(1)
    if missing:
        raise Failure("\n".join(_why_missing(inventory, name) for name in missing))


def _why_missing(inventory: Inventory, name: str) -> str:
    host = inventory.hosts[name]
    log = f"{host.folder}/ray.log"
    try:
        said = run_script(Remote(host), f"tail -n 12 {shell_path(log)}").stdout
    except Failure as error:
        said = str(error)
    indented = "".join(f"\n    {line}" for line in said.splitlines())
    return f"{name} is not in the cluster after {START_SECONDS} s; the end of {log} there:{indented}"
