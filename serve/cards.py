"""The cards that a plan is made for: those of the inventory in use, with what their memory reads."""

import re
from pathlib import Path

from serve.split import Card
from workbench.errors import UserError

BANDWIDTH = {
    "rtx-5090": 1792, "rtx-pro-6000": 1792, "rtx-5080": 960, "rtx-5070-ti": 896, "rtx-5060-ti": 448, "rtx-4090": 1008,
    "rtx-4080": 717, "rtx-3090": 936, "rtx-6000-ada": 960, "rtx-a6000": 768, "l40s": 864, "l4": 300, "a10": 600,
    "a100": 1935, "h100": 2000, "h200": 4800, "b200": 8000,
}  # fmt: skip
"""GB/s by the makers' data sheets; of cards in several forms the PCIe one's."""

SIZES_GB = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Cards by their memory, where no inventory names any."""


def card_of(model: str, memory_gb: float, host: str = "") -> Card:
    """A card of a host, by its model's name."""
    return Card(f"{model} on {host}" if host else model, memory_gb, float(BANDWIDTH.get(model, 0)))


def inventory_cards(file: Path | None) -> dict[str, list[Card]]:
    """The cards of the inventory ``file``, or of that in use, by host; empty where there is none. Raises UserError for
    a ``file`` that cannot be read."""
    from cluster.client_state import inventory_in_use

    try:
        inventory, _ = inventory_in_use(file)
    except UserError:
        if file is not None:
            raise
        return {}
    hosts = {
        name: [card_of(card.model, card.memory_gb, name) for card in host.cards]
        for name, host in inventory.hosts.items()
    }
    return {name: cards for name, cards in hosts.items() if cards}


def named_card(text: str) -> Card:
    """A card as typed: ``rtx-5090:32`` by model and GB, or ``24`` by GB alone. Raises UserError for anything else."""
    found = re.fullmatch(r"(?:([a-z0-9-]+):)?([0-9]+(?:\.[0-9]+)?)", text)
    if not found or float(found[2]) <= 0:
        raise UserError(f"'{text}' is no card: write MODEL:GB, for example rtx-5090:32")
    return card_of(found[1] or f"a card of {found[2]} GB", float(found[2]))
