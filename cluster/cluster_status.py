"""``cluster status``: what each host says of itself over ssh, and what the head says of the cluster.

When the head does not answer, what each host's supervisor says is still shown, with the end of Ray's log.
"""

from typing import Any

from cluster.activity import Activity, observe
from cluster.bring_up import reached
from cluster.client_state import fingerprint
from cluster.host_state import HostState, look, on_each
from cluster.inventory import Inventory
from cluster.nodes import Node, remote_nodes
from cluster.render import HostFile, revision
from workbench.errors import Failure, UserError


def gather(inventory: Inventory, files: dict[str, list[HostFile]], token: str | None) -> dict[str, Any]:
    """The cluster's state as one JSON object: ``head_error``, ``hosts`` by name, ``jobs``."""
    states, failures = on_each(inventory.hosts, lambda name: look(inventory, name, files[name], details=True))
    activity, nodes, head_error = Activity(), {}, ""
    try:
        with reached(inventory, open_cluster=token is None) as cluster:
            activity = observe(cluster, inventory.head)
            nodes = {node.host: node for node in remote_nodes(cluster)}
    except (Failure, UserError) as error:
        head_error = str(error)
    alive = {node.host for node in activity.nodes}
    hosts = {
        name: _host(inventory, name, files[name], states.get(name), failures.get(name, ""), nodes.get(name), token)
        | {"in_cluster": None if head_error else name in alive}
        | {"jobs": [job.job for job in activity.jobs_on([name])]}
        for name in inventory.hosts
    }
    strangers = sorted(alive - inventory.hosts.keys())
    jobs = [{"job": job.job, "command": job.command, "hosts": sorted(job.hosts)} for job in activity.jobs]
    return {
        "cluster": inventory.name,
        "head": inventory.head,
        "head_error": head_error,
        "hosts": hosts,
        "jobs": jobs,
        "not_in_inventory": strangers,
    }


def healthy(status: dict[str, Any]) -> bool:
    """Whether the head answers and every host is in the cluster."""
    return not status["head_error"] and all(host["in_cluster"] for host in status["hosts"].values())


def _host(
    inventory: Inventory,
    name: str,
    files: list[HostFile],
    state: HostState | None,
    failure: str,
    node: Node | None,
    token: str | None,
) -> dict[str, Any]:
    host = inventory.hosts[name]
    row: dict[str, Any] = {"address": host.address, "error": failure, "cards": [_card(card) for card in host.cards]}
    row |= {"mps": host.mps, "total": dict(node.total) if node else {}, "free": _free(node)}
    if state is None:
        return row | {"supervisor": "unknown", "log": [], "versions": {}, "current": None, "firewall": ""}
    current = state.running[0] == revision(files) and (token is None or state.running[1] == fingerprint(token))
    return row | {
        "supervisor": f"{host.keeper}: {state.supervisor}",
        "current": current,
        "versions": state.versions,
        "firewall": state.firewall,
        "log": [] if state.supervisor == "active" and node is not None else state.log,
    }


def _card(card: Any) -> dict[str, Any]:
    return {"model": card.model, "uuid": card.uuid, "memory_gb": card.memory_gb}


def _free(node: Node | None) -> dict[str, float] | None:
    return None if node is None or node.free is None else dict(node.free)


def lines(status: dict[str, Any]) -> list[str]:
    """The state for a person."""
    shown = [f"cluster {status['cluster']}, head {status['head']}"]
    if status["head_error"]:
        shown.append(f"the head does not answer: {status['head_error']}")
    for name, host in status["hosts"].items():
        place = {True: "alive", False: "NOT in the cluster", None: "unknown"}[host["in_cluster"]]
        shown.append(f"\n{name}  {host['address']}  {place}  ({host['supervisor']})")
        if host["error"]:
            shown.append(f"  {host['error']}")
        if versions := host["versions"]:
            shown.append("  " + ", ".join(f"{package} {version}" for package, version in versions.items()))
        shown.append(f"  {_capacity(host)}")
        if host["current"] is False and host["supervisor"].endswith(": active"):
            shown.append("  runs from earlier files: 'workbench cluster up' restarts it")
        if host["firewall"] in ("no", "old"):
            shown.append(
                "  firewall rules: " + {"no": "not in force", "old": "of an earlier inventory"}[host["firewall"]]
            )
        if host["jobs"]:
            shown.append(f"  runs {', '.join(host['jobs'])}")
        shown += [f"    | {line}" for line in host["log"]]
    if status["not_in_inventory"]:
        shown.append(f"\nalive but not in the inventory: {', '.join(status['not_in_inventory'])}")
    shown.append("")
    shown += [f"job {job['job']} on {', '.join(job['hosts'])}: {job['command']}" for job in status["jobs"]]
    if not status["jobs"] and not status["head_error"]:
        shown.append("no job runs")
    return shown


def _capacity(host: dict[str, Any]) -> str:
    cards = [f"{card['model']} {card['memory_gb']:g} GB" for card in host["cards"]] + ["Apple GPU"] * host["mps"]
    total, free = host["total"], host["free"]
    names = [name for name in total if not name.startswith(("node:", "accelerator_type:")) and "memory" not in name]
    if not names:
        return f"cards: {', '.join(cards) or 'none'}"
    amounts = [
        f"{name} {free[name]:g} of {total[name]:g} free" if free and name in free else f"{name} {total[name]:g}"
        for name in sorted(names)
    ]
    return f"cards: {', '.join(cards) or 'none'}; {', '.join(amounts)}"
