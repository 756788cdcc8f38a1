"""Commands run as jobs by the demo: submitted, watched through their run folders, their logs kept."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.jobs import POLL_SECONDS, exit_code, submit, wait
from workbench.config import runs_root
from workbench.errors import Failure
from workbench.files import read_json, write_atomic
from workbench.runs import Run

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_SECONDS = 20
RUN_NAME = "demo"


@dataclass(frozen=True)
class StartedJob:
    """A submitted command: its job id, and the run folders of its kind that were there before it."""

    key: str
    job: str
    argv: list[str]
    kind: Path
    before: frozenset[Path]

    def run_folder(self) -> Path | None:
        """The folder that the command has opened, or None if it has not come to that."""
        new = sorted(set(self.kind.glob(f"*-{RUN_NAME}*")) - self.before)
        return new[-1] if new else None


class DemoJobs:
    """Starts commands on one cluster and waits for them; ``run`` keeps their logs."""

    def __init__(self, client: "JobSubmissionClient", run: Run) -> None:
        self._client = client
        self._run = run
        self._running: list[StartedJob] = []

    def start(self, key: str, argv: list[str]) -> StartedJob:
        """Submit ``workbench ARGV`` and return at once."""
        kind = runs_root() / f"{argv[0]}-{argv[1]}"
        before = frozenset(kind.glob("*"))
        job = submit(self._client, [*argv, "--name", RUN_NAME], runs_root=runs_root())
        started = StartedJob(key, job, argv, kind, before)
        self._running.append(started)
        return started

    def wait(self, started: StartedJob, found: Callable[[str], None] = lambda _: None) -> Path:
        """Poll until the job ends, handing on what its run says it found; its run folder.

        Raises Failure with the end of the log and the command that repeats the step.
        """
        code = wait(self._client, started.job, lambda: found(_progress(started.run_folder())))
        self._running.remove(started)
        log = self._keep_log(started)
        folder = started.run_folder()
        if code != 0 or folder is None:
            tail = "\n".join(log.read_text().splitlines()[-12:])
            command = " ".join(["workbench", *started.argv])
            raise Failure(f"'{command}' ended with exit code {code}; the end of {log}:\n{tail}")
        return folder

    def stop_all(self) -> None:
        """Ask every running job to stop, wait until they have, and keep their logs."""
        deadline = time.monotonic() + STOP_SECONDS
        for started in self._running:
            with contextlib.suppress(Exception):
                self._client.stop_job(started.job)
        for started in self._running:
            with contextlib.suppress(Exception):
                while exit_code(self._client, started.job) is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                self._keep_log(started)
        self._running.clear()

    def _keep_log(self, started: StartedJob) -> Path:
        log = self._run.artifact("logs", f"{started.key}.log")
        write_atomic(log, self._client.get_job_logs(started.job))
        return log


def _progress(folder: Path | None) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        if folder is not None:
            return str(read_json(folder / "status.json")["progress"])
    return ""
