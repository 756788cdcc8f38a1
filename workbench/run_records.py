"""What recorded runs say: one row a run, the differences between runs, and which of them may go.

rows = [record_row(folder) for folder in find_runs()]
differences(Record.read(first), [Record.read(second)])
"""

import datetime
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workbench.cost import cards_of, cost, read_energy, read_prices
from workbench.files import fingerprint, read_record
from workbench.runs import describe_environment, find_runs, run_id, state_of

TRASH = ".trash"
FIGURES_SHOWN = 4


@dataclass(frozen=True)
class Record:
    """The files of one run folder; what a run that ended early has not written, or is damaged, is empty."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    inputs: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read a run folder."""
        names = ("environment", "inputs", "status", "summary")
        return cls(
            folder=folder,
            config=_read_config(folder / "config.yaml"),
            **{name: read_record(folder / f"{name}.json") or {} for name in names},
        )

    @property
    def id(self) -> str:
        """``group-command/time-name``."""
        return run_id(self.folder)

    def figures(self) -> dict[str, Any]:
        """The summary; paths inside the run folder are written relative to it, so that two runs can be compared."""
        return {key: _relative(value, self.folder) for key, value in self.summary.items()}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _started(folder: Path, status: Mapping[str, Any]) -> datetime.datetime:
    """When a run started: its status says so; where that is damaged, its folder's name or else the folder's age."""
    try:
        return datetime.datetime.fromisoformat(status["started"]).astimezone(datetime.UTC)
    except (KeyError, TypeError, ValueError):
        pass
    try:
        return datetime.datetime.strptime(folder.name[:15], "%Y%m%dT%H%M%S").replace(tzinfo=datetime.UTC)
    except ValueError:
        return datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)


def _relative(value: Any, folder: Path) -> Any:
    return value.replace(str(folder), "RUN") if isinstance(value, str) else value


def record_row(folder: Path) -> dict[str, Any]:
    """One run for a list: id, command, state, when, how long, on which commit, and its summary."""
    record = Record.read(folder)
    state, status = state_of(folder), record.status
    started, seconds = _started(folder, status), status.get("seconds")
    if seconds is None and state == "running":
        seconds = round((_now() - started).total_seconds(), 1)
    return {
        "id": record.id,
        "command": status.get("command", folder.parent.name.replace("-", " ", 1)),
        "state": state,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "commit": record.environment.get("git_commit", ""),
        "clean": record.environment.get("git_clean", False),
        "host": status.get("host", ""),
        "cost": cost(seconds, cards_of(record.config), read_energy(folder), read_prices()),
        "summary": record.summary,
        "folder": str(folder),
    }


def few_figures(summary: Mapping[str, Any]) -> str:
    """The first numbers of a summary, in a line."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    shown = [(k, v) for k, v in numbers.items() if k != "seconds"][:FIGURES_SHOWN]
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted keys."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = enumerate(value)
    if items is None:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def environment_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of an environment can change a result: commit, Python, platform, package versions, cards."""
    cards = [card.get("name") for card in environment.get("gpus", [])]
    facts = {key: environment.get(key) for key in ("git_commit", "git_clean", "python", "platform")}
    return {**facts, "gpus": ", ".join(map(str, cards)), **flatten(environment.get("packages", {}))}


def input_facts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies each input: its fingerprint where it has one, else its facts."""
    facts: dict[str, Any] = {}
    for name, described in inputs.items():
        facts |= {name: described["sha256"]} if "sha256" in described else flatten(described, name)
    return facts


def differing(sides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys whose values are not the same on all sides: ``{"key", "values"}``; an absent key is None.

    Numbers also get ``difference`` and ``relative``: each later side less the first, and that over the first.
    """
    keys = list(dict.fromkeys(key for side in sides for key in side))
    rows = []
    for key in keys:
        values = [side.get(key) for side in sides]
        if all(same(values[0], value) for value in values[1:]):
            continue
        row: dict[str, Any] = {"key": key, "values": values}
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(values):
            first = numbers[0]
            row["difference"] = [value - first for value in numbers[1:]]
            row["relative"] = [(value - first) / abs(first) if first else None for value in numbers[1:]]
        rows.append(row)
    return rows


def same(left: Any, right: Any) -> bool:
    """Equality of two figures; floats may differ in the last bits (relative 1e-9), NaN equals NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9) or (math.isnan(left) and math.isnan(right))
    return bool(left == right)


def differences(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Differing rows of config, environment, inputs and summary between runs."""
    return {
        "config": differing([flatten(record.config) for record in records]),
        "environment": differing([environment_facts(record.environment) for record in records]),
        "inputs": differing([input_facts(record.inputs) for record in records]),
        "summary": differing([flatten(record.figures()) for record in records]),
    }


def changes_since(record: Record) -> list[str]:
    """Warnings before a rerun: what of commit, packages, machine and inputs is no longer as recorded."""
    now = environment_facts(describe_environment())
    warnings = []
    if not record.environment.get("git_clean", False):
        warnings.append("the run's checkout had uncommitted changes, which nothing recorded")
    for row in differing([environment_facts(record.environment), now]):
        if row["key"] != "git_clean":
            warnings.append(f"{row['key']} was {row['values'][0]}, is {row['values'][1]}")
    for name, described in record.inputs.items():
        if "sha256" in described:
            path = Path(described["path"])
            if not path.exists():
                warnings.append(f"input '{name}' is gone: {path}")
            elif fingerprint(path) != described["sha256"]:
                warnings.append(f"input '{name}' has changed: {path}")
    return warnings


def prunable(keep: int | None, older_than_days: float | None, kind: str | None) -> list[Path]:
    """Runs that may go, oldest first: beyond the newest ``keep`` of their kind and older than given, where given.

    Never a running run, nor the newest finished one of a kind.
    """
    kinds: dict[str, list[Path]] = {}
    for folder in find_runs():
        if kind is None or folder.parent.name == kind:
            kinds.setdefault(folder.parent.name, []).append(folder)
    chosen = []
    for folders in kinds.values():
        states = {folder: state_of(folder) for folder in folders}
        newest = next((folder for folder in reversed(folders) if states[folder] == "finished"), None)
        old = folders[: max(0, len(folders) - keep)] if keep else folders
        for folder in old:
            if folder == newest or states[folder] == "running":
                continue
            started = _started(folder, read_record(folder / "status.json") or {})
            if older_than_days is None or _now() - started > datetime.timedelta(days=older_than_days):
                chosen.append(folder)
    return sorted(chosen, key=lambda folder: folder.name)


def remove(folder: Path) -> None:
    """Delete a run folder: renamed out of the runs first, so that no reader meets half of it."""
    trash = folder.parent.parent / TRASH / str(os.getpid())
    trash.mkdir(parents=True, exist_ok=True)
    folder.rename(trash / f"{folder.parent.name}-{folder.name}")
    shutil.rmtree(trash.parent, ignore_errors=True)  # with what an interrupted removal left


def size_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
