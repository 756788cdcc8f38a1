"""What work cost: GPU-hours by what it asked for, joules where it was recorded, money at the configured prices.

``prices.yaml`` beside the token of this checkout (``.workbench/``, or ``$WORKBENCH_STATE``):

    currency: EUR
    gpu_hour: 0.40         # what an hour of a card costs, without its energy
    kilowatt_hour: 0.30
"""

import re
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
    """How many cards a command's config asks for: those of a worker times its workers, of a sweep's trials at once, of
    all replicas of all models."""
    if isinstance(models := config.get("models"), list):
        return sum(_of_model(model) for model in models if isinstance(model, Mapping))
    if isinstance(trial := config.get("config"), Mapping):
        return float(config.get("concurrent") or 1) * cards_of(trial)
    return float(config.get("workers") or 1) * _of_worker(config, config.get("gpus_per_worker"))


def _of_worker(config: Mapping[str, Any], plain: float | None) -> float:
    """Cards of one worker: ``plain`` where no card is named. "all on HOST" is one for each worker."""
    asked = config.get("resources")
    if isinstance(asked, Mapping) and asked.get("gpu") is not None:
        return float(asked.get("share") or 1.0)
    if isinstance(asked, Mapping) and asked.get("gpus") is not None:
        return float(asked["gpus"]) if isinstance(asked["gpus"], int) else 1.0
    return float(plain or 0.0)


def _of_model(model: Mapping[str, Any]) -> float:
    """Cards of a served model; its ``gpus`` counts where it has to run on some."""
    engine = model.get("engine") or {}
    ranks = 1.0
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        ranks *= engine.get(size) or 1
    asked = model.get("resources")
    if isinstance(asked, Mapping) and isinstance(asked.get("gpus"), int):
        ranks = 1.0  # the number is that of all ranks
    each = _of_worker(model, model.get("gpus") if model.get("device") == "gpu" else None)
    return float(model.get("replicas") or 1) * ranks * each


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


def energy_told(joules: float) -> str:
    """A line of a job's log, from which ``joules_in`` reads it again."""
    return f"the cards took {joules:.0f} J meanwhile"


def joules_in(log: str) -> float | None:
    """What the log of a recorded job says that its cards took; None where it says nothing."""
    told = re.findall(r"the cards took (\d+) J meanwhile", log)
    return float(told[-1]) if told else None


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
