"""Cards by the names people use: ``rtx-5090`` for NVML's ``NVIDIA GeForce RTX 5090``."""

import re

EDITIONS = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|blackwell|generation|workstation|server|edition|max-q|laptop|gpu|"
    r"pcie|sxm\d?|nvl|hbm\w*|\d+\s?gb)\b",
    re.IGNORECASE,
)


def card_model(nvml_name: str) -> str:
    """The model of a card as an inventory and a request name it: lower case, words joined by hyphens.

    Maker, family and edition are left out: ``NVIDIA RTX PRO 6000 Blackwell Workstation Edition`` is ``rtx-pro-6000``.
    """
    return "-".join(re.findall(r"[a-z0-9]+", EDITIONS.sub(" ", nvml_name).lower()))
