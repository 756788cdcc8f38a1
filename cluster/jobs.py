"""Any ``workbench`` command as a Ray job: this repository as working directory, followed logs, the command's exit code.

    job = submit(client, ["data", "embed", "configs/demo/embed.yaml"], runs_root=runs_root())
    exit_code = follow(client, job)

The same by hand: ``ray job submit --working-dir . -- python -m workbench data embed configs/demo/embed.yaml``.
"""

import asyncio
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.config import CHECKOUT, CLEAN_VARIABLE, COMMIT_VARIABLE, RUNS_ROOT_VARIABLE
from workbench.errors import Failure, UserError
from workbench.runs import git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}
STOPPED_EXIT_CODE = 143
RECONNECT_SECONDS = 300
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class EntrypointResources:
    """What the job's own process reserves; the workers it starts ask for theirs."""

    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    custom: dict[str, float] = field(default_factory=dict)


def submit(
    client: "JobSubmissionClient",
    command: Sequence[str],
    *,
    runs_root: Path,
    name: str = "",
    resources: EntrypointResources | None = None,
    variables: dict[str, str] | None = None,
) -> str:
    """Upload this checkout (less what git ignores), start ``workbench COMMAND`` on the cluster; the job's id.

    Raises UserError when the cluster refuses the job: a package over Ray's limit, or an id that exists.
    """
    commit, clean = git_commit(CHECKOUT)
    variables = {
        RUNS_ROOT_VARIABLE: str(runs_root),
        COMMIT_VARIABLE: commit or "unknown",
        CLEAN_VARIABLE: "1" if clean else "0",
        **(variables or {}),
    }
    asked = resources or EntrypointResources()
    job = name or f"workbench-{secrets.token_hex(4)}"
    request = partial(
        client.submit_job,
        entrypoint=shlex.join(["python", "-m", "workbench", *command]),
        submission_id=job,
        runtime_env={"working_dir": str(CHECKOUT), "excludes": ["/.git"], "env_vars": variables},
        metadata={"command": shlex.join(command[:2])},
        entrypoint_num_cpus=asked.cpus or None,
        entrypoint_num_gpus=asked.gpus or None,
        entrypoint_memory=asked.memory or None,
        entrypoint_resources=asked.custom or None,
    )
    deadline = time.monotonic() + RECONNECT_SECONDS
    lost = False
    while True:
        try:
            return request()
        except OSError as error:  # requests' errors are OSErrors
            if time.monotonic() > deadline:
                raise Failure(f"the cluster does not answer: {error}; the job {job} may have been accepted") from None
            lost = True
            time.sleep(1)
        except (RuntimeError, ValueError) as error:
            if lost and "already exists" in str(error):
                return job  # the request whose answer was lost had arrived
            raise UserError(f"the cluster refused the job: {error}") from None


def follow(client: "JobSubmissionClient", job: str, write: Callable[[str], Any] = sys.stderr.write) -> int:
    """Write the job's log as it grows until the job ends, across lost connections; the command's exit code.

    Raises Failure when the cluster has not answered for five minutes; the job itself is not touched.
    """
    seen = 0
    lost_since: float | None = None
    while True:
        try:
            for chunk in _log_from(client, job, seen):
                seen += len(chunk)
                lost_since = None
                write(chunk)
            if (code := exit_code(client, job)) is not None:
                return code
        except (OSError, RuntimeError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > RECONNECT_SECONDS:
                raise Failure(f"lost the cluster while following {job}: {error}; the job may still run") from None
        time.sleep(POLL_SECONDS)


def wait(client: "JobSubmissionClient", job: str, watch: Callable[[], Any]) -> int:
    """Call ``watch`` until the job ends, across lost connections; the command's exit code.

    Raises Failure when the cluster has not answered for five minutes.
    """
    answered = time.monotonic()
    while True:
        try:
            if (code := exit_code(client, job)) is not None:
                return code
            answered = time.monotonic()
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > RECONNECT_SECONDS:
                raise Failure(f"lost the cluster while waiting for {job}: {error}; the job may still run") from None
        watch()
        time.sleep(POLL_SECONDS)


def exit_code(client: "JobSubmissionClient", job: str) -> int | None:
    """The exit code of an ended job (143 when it was stopped), or None while it is pending or running."""
    details = client.get_job_info(job)
    status = str(details.status.value if hasattr(details.status, "value") else details.status)
    if status not in ENDED:
        return None
    if status == "STOPPED":
        return STOPPED_EXIT_CODE
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return 0 if status == "SUCCEEDED" else 1


def describe(details: "JobDetails") -> dict[str, Any]:
    """One row for a person or for JSON: id, state, command, age and exit code."""
    started = (details.start_time or 0) / 1000
    ended = details.end_time / 1000 if details.end_time else None
    return {
        "job": details.submission_id,
        "state": str(details.status.value),
        "command": details.entrypoint.removeprefix("python -m workbench "),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
        "seconds": round((ended or time.time()) - started, 1),
        "exit_code": details.driver_exit_code,
        "message": details.message or "",
    }


def _log_from(client: "JobSubmissionClient", job: str, start: int) -> Iterator[str]:
    """The log from character ``start`` on, in chunks, until the server ends the stream."""
    stream = client.tail_job_logs(job)
    with asyncio.Runner() as runner:
        while (chunk := runner.run(anext(stream, None))) is not None:
            if kept := chunk[start:]:
                yield kept
            start = max(0, start - len(chunk))
