"""What a raylet tells of its host: node labels and custom resources, written by the bring-up, read by placement.

    host_labels("system-a", host)      # {"workbench.host": "system-a", "workbench.card0.model": "rtx-5090", ...}
    host_resources(host)               # {"rtx-5090": 1.0, "rtx-pro-6000": 1.0}

Ray's own ``GPU`` of a host counts its plain cards only. A label's value is at most 63 letters, digits, ``-``, ``_``
and ``.``, so each fact of a card is a label of its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.inventory import Card, Host

HOST = "workbench.host"
OS = "workbench.os"
NODE = "ray.io/node-id"
"""Ray's own label of every node."""
MPS = "mps"
"""The resource of an Apple GPU."""


@dataclass(frozen=True)
class CardOnHost:
    """One card as a node's labels tell of it."""

    model: str
    uuid: str
    memory_gb: float
    reserved: bool


def host_labels(name: str, host: Host) -> dict[str, str]:
    """The node labels of ``host``, those of the inventory included."""
    labels = {HOST: name, OS: host.os}
    for index, card in enumerate(host.cards):
        prefix = f"workbench.card{index}"
        labels |= {
            f"{prefix}.model": card.model,
            f"{prefix}.uuid": seen_as(host, index),
            f"{prefix}.memory-gb": f"{card.memory_gb:g}",
            f"{prefix}.kind": "reserved" if host.is_reserved(card) else "plain",
        }
    return {**host.labels, **labels}


def host_resources(host: Host) -> dict[str, float]:
    """The custom resources of ``host``: one of a model's name for each card, and ``mps`` on a Mac.

    Where a host has several reserved cards of one model, each is also a resource of its own, because a count does not
    say which of them a task holds.
    """
    resources: dict[str, float] = dict(Counter(card.model for card in host.cards))
    reserved = Counter(card.model for card in host.cards if host.is_reserved(card))
    for index, card in enumerate(host.cards):
        if host.is_reserved(card) and reserved[card.model] > 1:
            resources[card_resource(seen_as(host, index))] = 1.0
    if host.mps:
        resources[MPS] = float(host.mps)
    return {name: float(amount) for name, amount in resources.items()}


def plain_cards(host: Host) -> list[Card]:
    """The cards that Ray counts as ``GPU``: what the raylet's CUDA_VISIBLE_DEVICES lists."""
    return [card for card in host.cards if not host.is_reserved(card)]


def seen_as(host: Host, index: int) -> str:
    """How CUDA_VISIBLE_DEVICES names a card: by UUID, or by its place in NVML's order where the inventory has none."""
    return host.cards[index].uuid or str(index)


def card_resource(uuid: str) -> str:
    """The resource of one card, for a host with several reserved ones of a model."""
    return f"card-{uuid}"


def read_cards(labels: Mapping[str, str]) -> tuple[CardOnHost, ...]:
    """The cards that a node's labels name, in their order; none on a node that the bring-up did not start."""
    cards: list[CardOnHost] = []
    while model := labels.get(f"workbench.card{len(cards)}.model"):
        prefix = f"workbench.card{len(cards)}"
        cards.append(
            CardOnHost(
                model,
                labels.get(f"{prefix}.uuid", ""),
                float(labels.get(f"{prefix}.memory-gb", "0")),
                labels.get(f"{prefix}.kind") == "reserved",
            )
        )
    return tuple(cards)
