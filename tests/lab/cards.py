"""Cards of a lab host: what its stand-in for NVIDIA's driver library shows, and how a test changes it.

write_cards(host.path("/etc/nvidia-cards"), [replace(card, utilization=80)])
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")
HEAD = ("driver", "cuda", "p2p")


@dataclass(frozen=True)
class Card:
    """One card; sizes in bytes, PCIe counters in KiB/s, power in mW, clocks in MHz.

    None: the card has no such sensor.
    """

    name: str
    uuid: str
    memory: int
    memory_used: int | None = 0
    utilization: int | None = 0
    memory_utilization: int | None = 0
    pcie_generation: int | None = 5
    pcie_generation_max: int | None = 5
    pcie_generation_slot_max: int | None = 5
    pcie_width: int | None = 16
    pcie_width_max: int | None = 16
    pcie_sent: int | None = 0
    pcie_received: int | None = 0
    pcie_replays: int | None = 0
    power: int | None = 30_000
    power_limit: int | None = 600_000
    energy: int | None = 0
    temperature: int | None = 40
    sm_clock: int | None = 210
    memory_clock: int | None = 405
    sm_clock_max: int | None = 3000
    memory_clock_max: int | None = 14_000
    throttle_reasons: int | None = 1
    processes: tuple[tuple[int, int], ...] = ()


RTX_5090 = Card("NVIDIA GeForce RTX 5090", "GPU-5090aaaa-0000-4000-8000-000000000001", 32_607 << 20)
RTX_PRO_6000 = Card(
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "GPU-6000bbbb-0000-4000-8000-000000000002", 97_887 << 20
)
RTX_5060_TI = Card(
    "NVIDIA GeForce RTX 5060 Ti", "GPU-5060cccc-0000-4000-8000-000000000003", 16_311 << 20,
    pcie_width=8, pcie_width_max=8, power_limit=180_000,
)  # fmt: skip


def describe(cards: Sequence[Card], **head: str | int) -> str:
    """The text that the stand-in reads; ``head``: driver, cuda, p2p."""
    lines = [f"{key} {head[key]}" for key in HEAD if key in head]
    for card in cards:
        lines.append("card")
        for one in fields(card):
            value = getattr(card, one.name)
            if one.name == "processes":
                lines += [f"process {pid} {size}" for pid, size in value]
            else:
                lines.append(f"{one.name} {'none' if value is None else value}")
    return "\n".join(lines) + "\n"


def write_cards(file: Path, cards: Sequence[Card], **head: str | int) -> None:
    """Replace ``file`` in one step, so that a reader sees the old cards or the new ones."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(describe(cards, **head))
    new.replace(file)


def library(folder: Path) -> Path:
    """Build the stand-in below ``folder`` if it is not there: ``folder/nvml/libnvidia-ml.so.1``."""
    built = folder / "nvml" / "libnvidia-ml.so.1"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which("gcc") or "cc"
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", str(built), str(SOURCE)], check=True, env={**os.environ, "LC_ALL": "C"})
    return built
