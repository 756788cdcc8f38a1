"""The same metrics to three places: ``metrics.jsonl``, TensorBoard and Weights & Biases.

W&B runs offline unless a key is configured (``WANDB_API_KEY`` or a netrc entry for its host): there is never a
prompt and, without a key, never a network call. One process a run writes metrics: the driver, or a worker of rank 0.
"""

import json
import math
import netrc
import time
from pathlib import Path
from typing import Any

from workbench.config import default_environment, environment


def wandb_mode() -> str:
    """``WANDB_MODE`` if set, else ``online``; but ``offline`` for ``online`` where no key is configured."""
    mode = environment("WANDB_MODE") or "online"
    return "offline" if mode == "online" and not _has_key() else mode


def _has_key() -> bool:
    if environment("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Appends metrics of one run; the writers start with the first row, so a run without metrics costs nothing."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self._config = config or {}
        self._started = False

    def log(self, step: int, **values: float) -> None:
        """Record scalar ``values`` at ``step``; NaN and infinities are kept as null in JSON.

        Raises ValueError for a value that is not a number.
        """
        scalars = {key: float(value) for key, value in values.items()}
        if not self._started:
            self._start()
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in scalars.items()}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for key, value in scalars.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Flush and end all writers; safe to call twice or without any row logged."""
        if not self._started:
            return
        self._started = False
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            if summary:
                self._wandb.summary.update(summary)
            self._wandb.finish()

    def _start(self) -> None:
        from tensorboardX import SummaryWriter

        self._lines = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), write_to_disk=True)
        self._wandb = self._start_wandb()
        self._started = True

    def _start_wandb(self) -> Any:
        mode = wandb_mode()
        if mode == "disabled":
            return None
        default_environment("WANDB_ERROR_REPORTING", "false")  # importing wandb reports home even when it is offline
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        group, name = self.folder.parent.name, self.folder.name
        (self.folder / "wandb").mkdir(exist_ok=True)
        return wandb.init(
            project="workbench", group=group, name=name, dir=str(self.folder), config=self._config,
            mode="online" if mode == "online" else "offline", settings=settings,
        )  # fmt: skip


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, oldest first; a last line cut off by a kill is left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
