"""What a cluster has and what of it is free: seen by a member through Ray, by a laptop through the dashboard.

nodes = member_nodes()                  # after ray.init
nodes = remote_nodes(cluster_address)   # with the dashboard's address and token alone
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.labels import HOST, NODE, OS, CardOnHost, read_cards
from workbench.errors import Failure
from workbench.session import ClusterAddress

USAGE = re.compile(r"^([0-9.e+-]+)/([0-9.e+-]+) (\S+)")
"""A line of the dashboard's view of a node: ``1.0/4.0 CPU``; memory is written otherwise and not needed."""


@dataclass(frozen=True)
class Node:
    """A live raylet. ``free`` is what nobody holds now; None where that could not be learned. ``unlabelled`` is Ray's
    id of a raylet without our labels, which goes by its hostname."""

    host: str
    os: str = "linux"
    cards: tuple[CardOnHost, ...] = ()
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] | None = None
    unlabelled: str = ""


def node_of(labels: Mapping[str, str], hostname: str, total: Mapping[str, float], free: Any = None) -> Node:
    """The node that Ray describes by these labels and resources."""
    unlabelled = "" if HOST in labels else labels.get(NODE, "")
    return Node(labels.get(HOST, hostname), labels.get(OS, "linux"), read_cards(labels), dict(total), free, unlabelled)


def member_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    import ray
    from ray._private.state import available_resources_per_node  # what ray.util.tpu asks, too

    free = available_resources_per_node()
    return [
        node_of(node.get("Labels", {}), node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def remote_nodes(cluster: ClusterAddress) -> list[Node]:
    """The nodes of the cluster behind ``cluster.dashboard``; what is free is up to some ten seconds old.

    Raises Failure where the dashboard does not answer.
    """
    from cluster.job_client import job_client

    job_client(cluster)  # refuses a wrong token, and sets ours for the State API below
    from ray.util.state import list_nodes

    try:
        # A head that came back with its state counts the nodes of before as missing from the answer.
        alive = [("state", "=", "ALIVE")]
        states = list_nodes(cluster.dashboard, filters=alive, detail=True, timeout=20, raise_on_missing_output=False)
    except Exception as error:
        raise Failure(f"{cluster.dashboard} does not tell its nodes: {error}") from None
    free = _free(cluster)
    return [
        node_of(state.labels or {}, state.node_name, state.resources_total, free.get(state.node_id)) for state in states
    ]


def _free(cluster: ClusterAddress) -> dict[str, dict[str, float]]:
    """Free resources by node id, from the text that the dashboard shows; empty where it has none yet."""
    import urllib.request

    request = urllib.request.Request(f"{cluster.dashboard}/nodes?view=summary")
    if cluster.token_file is not None:
        request.add_header("Authorization", f"Bearer {cluster.token_file.read_text().strip()}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            texts = json.load(answer)["data"].get("nodeLogicalResources") or {}
    except (OSError, ValueError, KeyError):
        return {}
    return {node: parse_usage(text) for node, text in texts.items()}


def parse_usage(text: str) -> dict[str, float]:
    """What is free by a node's usage as the dashboard writes it, a line a resource."""
    found = (USAGE.match(line.strip()) for line in text.splitlines())
    return {match[3]: float(match[2]) - float(match[1]) for match in found if match}
