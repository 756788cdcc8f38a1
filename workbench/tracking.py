"""The same metrics to three places: ``metrics.jsonl``, TensorBoard and Weights & Biases.

W&B runs offline unless a key is configured (``WANDB_API_KEY`` or a netrc entry for its host): there is never a
prompt and, without a key, never a network call. Where W&B or TensorBoard fails, the run goes on without it; a row that
``metrics.jsonl`` cannot take is left out. One process a run writes metrics: the driver, or a worker of rank 0.
"""

import math
import netrc
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workbench.config import adopt_environment, default_environment, environment
from workbench.event_file import EventFile
from workbench.files import read_json, write_json
from workbench.row_file import RowFile, read_rows

MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""What ``WANDB_MODE`` may be, with wandb's older names, and what it means."""

WANDB_IDENTITY = "wandb/identity.json"
"""Id and name under which W&B knows a run. One that goes on elsewhere takes it along, and W&B goes on with the same."""

METRICS = "metrics.jsonl"
BOARD, WANDB = "TensorBoard", "W&B"

INIT_TIMEOUT_SECONDS = 20.0
"""How long a run waits for W&B's server before it goes on offline."""


def wandb_mode() -> str:
    """``WANDB_MODE`` if set, else ``online``; but ``offline`` for ``online`` where no key is configured, and for a word
    that wandb does not know, which is told on stderr."""
    given = environment("WANDB_MODE") or "online"
    mode = MODES.get(given)
    if mode is None:
        print(f"WANDB_MODE={given} is none of {', '.join(MODES)}: W&B runs offline", file=sys.stderr)
        adopt_environment({"WANDB_MODE": "offline"})  # wandb reads it too, and would refuse to start
        return "offline"
    return "offline" if mode == "online" and not _has_key() else mode


def _has_key() -> bool:
    if environment("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(_netrc_file()).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(known.keys() & _wandb_hosts())


def _netrc_file() -> Path:
    """The file that ``wandb login`` writes."""
    if given := environment("NETRC"):
        return Path(given).expanduser()
    first, second = (Path.home() / name for name in (".netrc", "_netrc"))
    return second if second.exists() and not first.exists() else first


def _wandb_hosts() -> set[str]:
    """The hosts under which a key of the configured W&B server is kept: its own, and the one behind it."""
    _quiet_import()
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import urls

    try:
        address = environment("WANDB_BASE_URL") or wandb_setup.singleton().settings.base_url
        addresses = [urls.normalize_forge_base_url(address)]
    except Exception as error:  # an address that wandb refuses: it has no key
        print(f"W&B is not configured as it should be, it runs offline: {_line(error)}", file=sys.stderr)
        return set()
    return {urlsplit(each).netloc for each in [*addresses, urls.forge_upstream_url(addresses[0])]} - {""}


def _quiet_import() -> None:
    default_environment("WANDB_ERROR_REPORTING", "false")  # importing wandb reports home even when it is offline


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Tracker:
    """Appends metrics of one run; the writers start with the first row, so a run without metrics costs nothing.

    ``first_step`` is where a run goes on that was cut short: TensorBoard forgets what it saw from there on. Without
    ``offline`` W&B is left out where it would only write files.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any] | None = None, first_step: int | None = None, offline: bool = True
    ) -> None:
        self.folder = folder
        self._offline = offline
        self._config = config or {}
        self._first_step = first_step
        self._started = False
        self._rows = RowFile(folder / METRICS)
        self._writers: dict[str, Any] = {}  # those beside it that have not failed

    def log(self, step: int, **values: float) -> None:
        """Record scalar ``values`` at ``step``; NaN and infinities are kept as null in JSON.

        Raises ValueError for a value that is not a number.
        """
        scalars = {key: float(value) for key, value in values.items()}
        if not self._started:
            self._start()
        finite = {key: value if math.isfinite(value) else None for key, value in scalars.items()}
        self._rows.add({"step": step, "time": round(time.time(), 3), **finite})
        self._give(BOARD, "takes no more metrics", lambda board: board.add(step, scalars))
        self._give(WANDB, "takes no more metrics", lambda run: run.log(scalars, step=step))

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End all writers; safe to call twice or without any row logged."""
        if not self._started:
            return
        self._started = False
        self._give(BOARD, "did not end in order", lambda board: board.close())
        if summary:
            self._give(WANDB, "took no summary", lambda run: run.summary.update(summary))
        self._give(WANDB, "did not end in order", lambda run: run.finish())
        self._writers.clear()

    def _start(self) -> None:
        starts: dict[str, Callable[[], Any]] = {
            BOARD: lambda: EventFile(self.folder / "tensorboard", self._first_step),
            WANDB: self._start_wandb,
        }
        for name, start in starts.items():
            try:
                writer = start()
            except Exception as error:  # a full disk: never the end of a run
                print(f"{name} did not start, this run goes on without it: {_line(error)}", file=sys.stderr)
                continue
            if writer is not None:
                self._writers[name] = writer
        self._started = True

    def _start_wandb(self) -> Any:
        mode = wandb_mode()
        if mode == "disabled" or (mode == "offline" and not self._offline):
            return None
        _quiet_import()
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, init_timeout=INIT_TIMEOUT_SECONDS
        )
        group, again = self.folder.parent.name, (self.folder / WANDB_IDENTITY).exists()
        identity = self._wandb_identity()
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                return wandb.init(
                    project="workbench", group=group, dir=str(self.folder), config=self._config, mode=attempt,
                    settings=settings, resume="allow" if again and attempt == "online" else None, **identity,
                )  # fmt: skip
            except Exception as error:  # a wrong key, no network, a full disk: never the end of a run
                then = "it runs offline" if attempt == "online" else "this run goes on without it"
                print(f"W&B did not start, {then}: {_line(error)}", file=sys.stderr)
                wandb.teardown()  # its process holds the id of the run that did not start
        return None

    def _wandb_identity(self) -> dict[str, str]:
        file = self.folder / WANDB_IDENTITY
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(4), "name": self.folder.name})
        known: dict[str, str] = read_json(file)
        return known

    def _give(self, name: str, trouble: str, act: Callable[[Any], object]) -> None:
        """Do ``act`` with the writer ``name``, which is given up if it fails: the others go on."""
        if name not in self._writers:
            return
        try:
            act(self._writers[name])
        except Exception as error:
            print(f"{name} {trouble}: {_line(error)}", file=sys.stderr)
            del self._writers[name]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, oldest first; a last line cut off by a kill is left out."""
    return read_rows(folder / METRICS)
