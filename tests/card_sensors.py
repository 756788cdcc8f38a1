"""Which of a card's sensors a sampler neither read nor named as missing."""

from collections.abc import Collection

from profiling.samplers import UNITS

BY_CARD = [metric for metric in UNITS if metric.startswith(("gpu.", "pcie.")) and metric != "gpu.process_memory"]
"""A card's own; what a process holds is there only where one runs."""


def unaccounted(read: Collection[tuple[str, str]], missing: Collection[str], cards: int) -> list[str]:
    """The sensors that are neither among those ``read`` (metric and device) nor ``missing``, or are both."""
    return [
        f"{metric} of card {card}"
        for card in range(cards)
        for metric in BY_CARD
        if ((metric, str(card)) in read) == (f"{metric} of card {card}" in missing)
    ]
