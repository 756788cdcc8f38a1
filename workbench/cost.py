"""What work cost: GPU-hours by what it asked for, joules where it was recorded, money at the configured prices.

``prices.yaml`` beside the token of this checkout (``.workbench/``, or ``$WORKBENCH_STATE``):

    currency: EUR
    gpu_hour: 0.40         # what an hour of a card costs, without its energy
    kilowatt_hour: 0.30
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from workbench.config import Config, load
from workbench.files import read_record, write_json
from workbench.session import state_folder

ENERGY = "energy.json"


class Prices(Config):
    """Money for an hour of a card and for energy."""

    currency: str = Field("EUR", description="how amounts are written")
    gpu_hour: float = Field(0.0, ge=0, description="for an hour of a card")
    kilowatt_hour: float = Field(0.0, ge=0, description="for energy of cards, where it was recorded")


def read_prices() -> Prices:
    """The prices of this checkout; nothing costs money where none are set. Raises UserError for a file that is none."""
    file = state_folder() / "prices.yaml"
    return load(Prices, file) if file.exists() else Prices()


def cards_of(config: Mapping[str, Any]) -> float:
    """How many cards a command's config asks for: those of a worker times its workers."""
    workers = config.get("workers") or 1
    asked = config.get("resources") or {}
    each = config.get("gpus_per_worker") or 0.0
    if isinstance(asked, Mapping) and asked.get("gpu") is not None:
        each = asked.get("share") or 1.0
    elif isinstance(asked, Mapping) and asked.get("gpus") is not None:
        each = asked["gpus"] if isinstance(asked["gpus"], int) else 1.0
    return float(workers) * float(each)


def cost(seconds: float | None, cards: float, joules: float | None, prices: Prices) -> dict[str, Any]:
    """GPU-hours, joules and money; money is None where no price applies."""
    hours = round(cards * (seconds or 0.0) / 3600, 4)
    money = hours * prices.gpu_hour + (joules or 0.0) / 3.6e6 * prices.kilowatt_hour
    priced = (hours and prices.gpu_hour) or (joules and prices.kilowatt_hour)
    return {
        "gpu_hours": hours,
        "joules": joules,
        "money": round(money, 4) if priced else None,
        "currency": prices.currency,
    }


def write_energy(folder: Path, joules: float | None) -> None:
    """Keep what a recorded run used beside its summary."""
    write_json(folder / ENERGY, {"joules": joules})


def read_energy(folder: Path) -> float | None:
    """Joules that the cards took while the run was recorded; None where that is not known."""
    return (read_record(folder / ENERGY) or {}).get("joules")


def cost_text(cost: Mapping[str, Any] | None) -> str:
    """Short, for a list: empty where nothing is known to have cost anything."""
    parts: list[str] = []
    if cost is None:  # a row of an older checkout's
        return ""
    if cost["gpu_hours"]:
        parts.append(f"{cost['gpu_hours']:.2f} GPU h")
    if cost["joules"]:
        parts.append(f"{cost['joules'] / 3.6e6:.3f} kWh")
    if cost["money"] is not None:
        parts.append(f"{cost['money']:.2f} {cost['currency']}")
    return " ".join(parts)
