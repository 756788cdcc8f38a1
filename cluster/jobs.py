"""Any ``workbench`` command as a Ray job: this repository as working directory, followed logs, the command's exit code.

    job = submit(client, ["data", "embed", "configs/demo/embed.yaml"], runs_root=runs_root())
    exit_code = follow(client, job)

The same by hand: ``ray job submit --working-dir . -- python -m workbench data embed configs/demo/embed.yaml``.
"""

import asyncio
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
    try:
        return client.submit_job(
            entrypoint=shlex.join(["python", "-m", "workbench", *command]),
            submission_id=name or None,
            runtime_env={"working_dir": str(CHECKOUT), "excludes": ["/.git"], "env_vars": variables},
            metadata={"command": shlex.join(command[:2])},
            entrypoint_num_cpus=asked.cpus or None,
            entrypoint_num_gpus=asked.gpus or None,
            entrypoint_memory=asked.memory or None,
            entrypoint_resources=asked.custom or None,
        )
    except (RuntimeError, ValueError) as error:
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
        except (ConnectionError, OSError, RuntimeError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > RECONNECT_SECONDS:
                raise Failure(f"lost the cluster while following {job}: {error}; the job may still run") from None
        time.sleep(0.5)


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
