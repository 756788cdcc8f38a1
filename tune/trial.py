"""One trial of a sweep, and what the driver learns of it while it runs."""

from pathlib import Path
from typing import Any

from ray import tune
from torch import nn, optim

from tune.space import at_point
from workbench.config import adopt_environment
from workbench.runs import Run
from workloads.training.history import History


class TrialEvents:
    """The loop's events in a trial: the held-out loss goes to Tune, whose scheduler may end the trial there."""

    def log(self, step: int, **values: float) -> None:
        """Report a row that has the metric; Tune counts reports, so others stay out."""
        if "validation_loss" in values:
            tune.report({"step": step, **values})

    def checkpoint(self, history: History, model: nn.Module, optimizer: optim.Optimizer) -> None:
        """A trial is short: it starts again rather than resume."""


def sft_trial(trial: dict[str, Any], shared: dict[str, Any]) -> None:
    """Fine-tune at ``trial["point"]`` of the space on this process' device; the adapter goes to ``folder/NAME``."""
    from workloads.fine_tune import fine_tune
    from workloads.prepared import recipe_of
    from workloads.tokenized import TokenRows, tokenize
    from workloads.training.devices import local_device

    adopt_environment(shared["environment"])  # Tune gives its trials no runtime environment
    config = at_point(shared["config"], trial["point"])
    rows, validation = (  # there already, unless the space varies how rows are made
        TokenRows(tokenize(Path(shared[part]), recipe_of(config), Path(shared["cache"])))
        for part in ("train", "validation")
    )
    fine_tune(
        config,
        rows,
        validation,
        device=local_device(config),
        events=TrialEvents(),
        result=Path(shared["folder"]) / tune.get_context().get_trial_name(),
    )


class Progress(tune.Callback):
    """Follows the trials on the driver: says each held-out loss, and remembers curves and errors."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._seen: dict[str, dict[str, Any]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember its point of the space."""
        point = dict(trial.config["point"])
        self._seen.setdefault(str(trial), {"point": point, "curve": [], "error": ""})
        self._run.say(f"trial {trial} starts: " + ", ".join(f"{key}={_short(value)}" for key, value in point.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Add to its curve."""
        self._seen[str(trial)]["curve"].append((result["step"], result["validation_loss"]))
        self._run.say(f"trial {trial}, step {result['step']}: held-out loss {result['validation_loss']:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Keep the last line of what it raised."""
        text = trial.get_error() if hasattr(trial, "get_error") else None
        entry = self._seen.setdefault(str(trial), {"point": dict(trial.config["point"]), "curve": [], "error": ""})
        entry["error"] = str(text or "failed").strip().splitlines()[-1]

    def trials(self, folder: Path) -> list[dict[str, Any]]:
        """Every trial in order; it finished if it wrote its adapter below ``folder``."""
        rows = []
        for name, entry in sorted(self._seen.items(), key=lambda item: int(item[0])):
            done = (folder / name / "adapter_config.json").is_file()
            state = "finished" if done else "failed" if entry["error"] else "stopped early"
            step, loss = entry["curve"][-1] if entry["curve"] else (0, None)
            rows.append(
                {"trial": name, "point": entry["point"], "state": state, "steps": step, "validation_loss": loss,
                 "curve": entry["curve"], "folder": str(folder / name), "error": entry["error"]}
            )  # fmt: skip
        return rows


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
