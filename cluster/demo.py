"""``workbench demo``: the main job end to end on this machine, every step a Ray job on a head of its own.

The head runs on loopback with token authentication and the dashboard, and the profiler records the whole time. A
step that finished before with the same arguments, config and code is reused, unless ``fresh``.
"""

import contextlib
import hashlib
import json
import shlex
import shutil
import socket
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from cluster.demo_display import Display
from cluster.demo_jobs import DemoJobs
from cluster.demo_report import headline, write_report
from cluster.stages import PORT, Stage, Step, stages
from workbench.config import CHECKOUT, Config, runs_root
from workbench.errors import Failure, UserError
from workbench.files import read_json, write_atomic, write_json
from workbench.marks import phase
from workbench.runs import Run, Summary, find_runs, run_id, state_of
from workbench.session import local_cluster


class DemoConfig(Config):
    """What ``workbench demo`` takes."""

    fresh: bool = Field(False, description="Run every stage again, even where an equal one finished.")
    seed: int = Field(
        17, ge=0, description="Seed of the training, of the sweep's draw and of the evaluation's questions."
    )


def check(config: DemoConfig) -> None:
    """Raise UserError where this checkout has a head already, before ``fresh`` removes anything."""
    if config.fresh and (running := local_cluster()) is not None:
        raise UserError(f"this checkout is connected to a head at {running.dashboard}; stop that first (Ctrl-C in it)")


def run(config: DemoConfig, run: Run) -> Summary:
    """Run the stages in order and gather them in one report.

    Raises Failure, naming the log and the command that repeats it, when a step ends badly.
    """
    if config.fresh:
        shutil.rmtree(runs_root() / "demo", ignore_errors=True)
    plan = stages()
    with Display([stage.title for stage in plan] + ["Profile"]) as display, ExitStack() as head:
        demo = Demo(config, run, display, head)
        for index, stage in enumerate(plan):
            demo.stage(index, stage)
        demo.profile(len(plan))
    return write_report(run, plan, demo.results, demo.commands)


class Demo:
    """One pass over the stages. The head starts with the first step that cannot be reused and ends with ``head``."""

    def __init__(self, config: DemoConfig, run: Run, display: Display, head: ExitStack) -> None:
        self.results: dict[str, Path] = {}
        """Run folder of each finished step, by the step's key."""
        self.commands: dict[str, str] = {}
        """What a user types to repeat the step."""
        self._config, self._run, self._display, self._head = config, run, display, head
        self._jobs: DemoJobs | None = None
        self._finished = FinishedSteps(runs_root() / "demo" / "finished.json")
        self._stop_file = run.folder / "artifacts" / "stop-recording"

    def stage(self, index: int, stage: Stage) -> None:
        """Run or reuse the steps of one stage, and show it as line ``index``."""
        if stage.skip:
            self._display.end(index, "skipped", stage.skip)
            return
        if self._reuse(stage):
            self._display.end(index, "reused", headline(self.results[stage.steps[0].key]))
            return
        jobs = self._start_head()
        self._display.begin(index)
        port = _port_to_serve() if stage.live else PORT
        with phase(stage.title):
            for step in stage.steps:
                fingerprint = self._fingerprint(step)
                argv = self._arguments(step, port)
                folder = None if stage.live else self._finished.get(fingerprint)
                if folder is None:
                    folder = jobs.wait(jobs.start(step.key, argv), lambda text: self._display.found(index, text))
                    self._finished.put(fingerprint, folder)
                self.results[step.key] = folder
        self._display.end(index, "done", headline(self.results[stage.steps[0].key]))

    def profile(self, index: int) -> None:
        """End the recording and draw it; where everything was reused, take the drawing of the pass that ran it."""
        if self._jobs is None and (folder := self._finished.get("timeline")) is not None:
            self.results["timeline"] = folder
            self._display.end(index, "reused", headline(folder))
            return
        jobs = self._start_head()
        self._display.begin(index)
        write_atomic(self._stop_file, "")
        recording = jobs.wait(self._recorder)
        argv = ["profile", "report", f"recording=runs/{run_id(recording)}"]
        self.results["timeline"] = jobs.wait(jobs.start("timeline", argv))
        self.commands["timeline"] = _typed(argv)
        self._finished.put("timeline", self.results["timeline"])
        self._display.end(index, "done", headline(self.results["timeline"]))

    def _reuse(self, stage: Stage) -> bool:
        """Take all steps of the stage from earlier runs, or none."""
        before = dict(self.results)
        for step in stage.steps:
            folder = self._finished.get(self._fingerprint(step))
            if folder is None or _collection_changed_since(folder):
                self.results = before
                return False
            self.results[step.key] = folder
        return True

    def _fingerprint(self, step: Step) -> str:
        """Of the arguments, and of the collection's maker where the step searches it."""
        after = [str(self.results["embed"])] if step.searches and "embed" in self.results else []
        return fingerprint_of([*self._arguments(step), *after])

    def _arguments(self, step: Step, port: int = PORT) -> list[str]:
        """The step's arguments, with earlier runs as ``runs/...`` paths, so that they can be typed as they are."""
        runs = {key: f"runs/{run_id(folder)}" for key, folder in self.results.items()}
        argv = [argument.format(**runs, port=port) for argument in step.command]
        if step.seeded:
            argv.append(f"seed={self._config.seed}")
        self.commands[step.key] = _typed(argv)
        return argv

    def _start_head(self) -> DemoJobs:
        if self._jobs is None:
            from cluster.job_client import job_client
            from cluster.local_head import local_head

            self._run.say("starting a Ray head on loopback")
            cluster = self._head.enter_context(local_head())
            self._jobs = DemoJobs(job_client(cluster), self._run)
            self._head.callback(self._jobs.stop_all)
            argv = ["profile", "record", "configs/demo/record.yaml", f"stop_file={self._stop_file}"]
            self._recorder = self._jobs.start("record", argv)
        return self._jobs


class FinishedSteps:
    """Which steps finished, by the fingerprint of their arguments and configs; kept in a file between demos."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, fingerprint: str) -> Path | None:
        """The folder of the finished run that ``fingerprint`` names, if it is still there and whole."""
        known = read_json(self._file) if self._file.exists() else {}
        if fingerprint not in known:
            return None
        folder = Path(known[fingerprint])
        return folder if (folder / "summary.json").is_file() and state_of(folder) == "finished" else None

    def put(self, fingerprint: str, folder: Path) -> None:
        """Remember a finished run."""
        known = read_json(self._file) if self._file.exists() else {}
        write_json(self._file, {**known, fingerprint: str(folder)})


def fingerprint_of(argv: list[str]) -> str:
    """SHA-256 (16 hex digits) of the arguments, the text of each config file among them, and our code."""
    texts = [(CHECKOUT / argument).read_text() for argument in argv if argument.endswith(".yaml")]
    return hashlib.sha256(json.dumps([argv, texts, code_fingerprint()]).encode()).hexdigest()[:16]


@cache
def code_fingerprint() -> str:
    """SHA-256 of every Python file of our packages: what other code made is made again."""
    digest = hashlib.sha256()
    for package in sorted(init.parent for init in CHECKOUT.glob("*/__init__.py")):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(CHECKOUT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _collection_changed_since(folder: Path) -> bool:
    """Whether ``folder`` is of a ``data embed`` whose collection a later run has written to."""
    if folder.parent.name != "data-embed":
        return False
    place = _collection(folder)
    return any(_collection(later) == place for later in find_runs() if later.parent == folder.parent and later > folder)


def _collection(folder: Path) -> tuple[Any, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config.get("uri"), config.get("collection")


def _port_to_serve() -> int:
    """``PORT``, or a free one where something listens there already."""
    for port in (PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise Failure("no port is free on loopback")


def _typed(argv: list[str]) -> str:
    return shlex.join(["workbench", *argv])
