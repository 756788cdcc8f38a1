"""Any ``workbench`` command as a Ray job: this repository as working directory, followed logs, the command's exit code.

    job = submit(client, ["data", "embed", "configs/demo/embed.yaml"], runs_root=runs_root())
    exit_code = follow(client, job)

The same by hand: ``ray job submit --working-dir . -- python -m workbench data embed configs/demo/embed.yaml``;
``workbench submit --dry-run`` prints the whole line.
"""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.job_spec import EXEC, EntrypointResources, JobSpec, check_name, hidden_line
from workbench.cost import cost, joules_in, read_prices
from workbench.errors import Failure, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}
STOPPED_EXIT_CODE = 143
RECONNECT_SECONDS = 300
POLL_SECONDS = 0.5


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
    spec = JobSpec(list(command), runs_root, resources or EntrypointResources(), variables or {})
    return submit_spec(client, spec, name)


def submit_spec(client: "JobSubmissionClient", spec: JobSpec, name: str = "") -> str:
    """Submit ``spec``; the job's id. Raises UserError as ``submit`` does, and where it would wait in vain."""
    check_name(name)
    if name and _exists(client, name):
        raise UserError(_taken(name))
    for job in spec.after:
        if state_of_job(client, job, missing_is_mistake=True) in ENDED - {"SUCCEEDED"}:
            raise UserError(f"--after {job}: it has not succeeded, so this job would never start")
    return request_job(client, name or random_name(), spec.arguments())


def random_name() -> str:
    """A name for a job that was given none."""
    return f"workbench-{secrets.token_hex(4)}"


def _exists(client: "JobSubmissionClient", job: str) -> bool:
    """Whether the cluster has such a job: asked before an upload for nothing. Where it does not answer, False."""
    try:
        client.get_job_info(job)
    except (OSError, RuntimeError):
        return False
    return True


def _taken(job: str) -> str:
    return f"--name {job}: the cluster already has a job of that name; choose another, or see 'workbench jobs list'"


def _last_line(error: Exception) -> str:
    """What a server's traceback ends with, or the whole message where it holds none."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if "Traceback" in text and lines else text


def request_job(client: "JobSubmissionClient", job: str, arguments: dict[str, Any]) -> str:
    """Ask for the job until the cluster has answered, so that a lost answer starts nothing twice; its id."""
    request = partial(client.submit_job, submission_id=job, **arguments)
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
            if "already exists" in str(error):
                if lost:
                    return job  # the request whose answer was lost had arrived
                raise UserError(_taken(job)) from None
            raise UserError(f"the cluster refused the job: {_last_line(error)}") from None


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


def state_of_job(client: "JobSubmissionClient", job: str, *, missing_is_mistake: bool = False) -> str:
    """PENDING, RUNNING, or one of ``ENDED``; asked again for five minutes where the cluster does not answer.

    Raises Failure after that, and UserError for a job that the cluster does not know, if that is a mistake.
    """
    begun = time.monotonic()
    while True:
        try:
            return _state(client.get_job_info(job))
        except (OSError, RuntimeError) as error:
            if "404" in str(error):
                if missing_is_mistake:
                    raise UserError(f"no job '{job}' on this cluster; see 'workbench jobs list'") from None
                raise Failure(f"the cluster no longer knows the job '{job}'") from None
            if time.monotonic() - begun > RECONNECT_SECONDS:
                raise Failure(f"the cluster does not answer: {error}") from None
            time.sleep(POLL_SECONDS)


def exit_code(client: "JobSubmissionClient", job: str) -> int | None:
    """The exit code of an ended job (143 when it was stopped), or None while it is pending or running."""
    details = client.get_job_info(job)
    status = _state(details)
    if status not in ENDED:
        return None
    if status == "STOPPED":
        return STOPPED_EXIT_CODE
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return 0 if status == "SUCCEEDED" else 1


def _state(details: "JobDetails") -> str:
    return str(details.status.value if hasattr(details.status, "value") else details.status)


def joules_of(client: "JobSubmissionClient", details: "JobDetails") -> float | None:
    """What the cards took while a job ran, by its log; None unless it was recorded and has ended."""
    if " --profile" not in details.entrypoint or _state(details) not in ENDED:
        return None
    try:
        return joules_in(client.get_job_logs(details.submission_id))
    except (OSError, RuntimeError):  # its host, and its log, are gone
        return None


def describe(details: "JobDetails", joules: float | None = None) -> dict[str, Any]:
    """One row for a person or for JSON; ``seconds`` is how long it has run, ``age`` since when it is known."""
    started = (details.start_time or 0) / 1000
    ended = details.end_time / 1000 if details.end_time else None
    metadata = details.metadata or {}
    seconds = (ended or time.time()) - started
    return {
        "job": details.submission_id,
        "state": _state(details),
        "owner": metadata.get("owner", ""),
        "command": hidden_line(metadata.get("command", details.entrypoint.removeprefix(f"{EXEC}python -m workbench "))),
        "resources": metadata.get("resources", ""),
        "after": metadata.get("after", ""),
        "retries": int(metadata.get("retries", "0")),
        "secrets": metadata.get("secrets", ""),
        "part_of": metadata.get("part_of", ""),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
        "age": round(time.time() - started, 1),
        "seconds": round(seconds, 1),
        "cost": cost(seconds, float(metadata.get("cards", "0")), joules, read_prices()),
        "exit_code": details.driver_exit_code,
        "message": details.message or "",
    }


def waits_for(client: "JobSubmissionClient", details: "JobDetails", nodes: Callable[[], Any]) -> str:
    """What a job waits for: other jobs, or resources that ``nodes()`` do not have free; empty where it does not."""
    metadata = details.metadata or {}
    if _state(details) == "RUNNING" and metadata.get("after") and not metadata.get("part_of"):
        states = {job: state_of_job(client, job) for job in metadata["after"].split(", ")}
        return ", ".join(f"{job} ({state.lower()})" for job, state in states.items() if state not in ENDED)
    if _state(details) == "PENDING" and metadata.get("asks"):
        from cluster.placement import lacking

        asked = json.loads(metadata["asks"])
        return lacking(asked["bundle"], asked["label_selector"], nodes())
    return ""


def _log_from(client: "JobSubmissionClient", job: str, start: int) -> Iterator[str]:
    """The log from character ``start`` on, in chunks, until the server ends the stream."""
    stream = client.tail_job_logs(job)
    with asyncio.Runner() as runner:
        while (chunk := runner.run(anext(stream, None))) is not None:
            if kept := chunk[start:]:
                yield kept
            start = max(0, start - len(chunk))
