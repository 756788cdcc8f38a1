"""The three machines as tests see them: their inventory, and what their raylets tell."""

from cluster.inventory import Card, Host, Inventory, PcieLink
from cluster.labels import host_labels, host_resources, plain_cards
from cluster.nodes import Node, node_of

RTX_5090 = "GPU-11111111-5090-5090-5090-111111111111"
RTX_PRO_6000 = "GPU-22222222-6000-6000-6000-222222222222"
RTX_5060_TI = "GPU-33333333-5060-5060-5060-333333333333"


def card(model: str, memory_gb: float, uuid: str, reserved: bool | None = None) -> Card:
    """A card in a slot that is wide enough."""
    return Card(
        model=model, memory_gb=memory_gb, uuid=uuid, pcie=PcieLink(generation=5, width=16), reserved=reserved
    )  # fmt: skip


INVENTORY = Inventory(
    head="system-a",
    storage="/srv/workbench",
    hosts={
        "system-a": Host(
            address="10.0.0.1", user="u", os="linux", cpus=16,
            cards=[card("rtx-5090", 32, RTX_5090), card("rtx-pro-6000", 96, RTX_PRO_6000)],
        ),
        "linux-box": Host(
            address="10.0.0.2", user="u", os="linux", cpus=8, cards=[card("rtx-5060-ti", 16, RTX_5060_TI)]
        ),
        "mac": Host(address="10.0.0.3", user="u", os="macos", cpus=12, mps=1),
    },
)  # fmt: skip


def node(name: str, host: Host, **held: float) -> Node:
    """The raylet of ``host``; ``held`` of its resources are taken."""
    total = {"CPU": float(host.cpus or 1), "GPU": float(len(plain_cards(host))), **host_resources(host)}
    free = {key: amount - held.get(key.replace("-", "_"), 0.0) for key, amount in total.items()}
    return node_of(host_labels(name, host), name, total, free)


def nodes(**held: dict[str, float]) -> list[Node]:
    """All three; ``held`` by host name with underscores."""
    return [node(name, host, **held.get(name.replace("-", "_"), {})) for name, host in INVENTORY.hosts.items()]
