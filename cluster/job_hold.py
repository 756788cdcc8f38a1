"""The supervisor of a job that waits for others or is tried again; itself a job, so no laptop need stay open.

    python -m cluster.job_hold -- train sft configs/demo/sft.yaml

It runs on the head, reserves nothing, and submits each attempt as a job of its own, NAME.1, NAME.2 and so on, with the
resources that were asked for; it prints their logs and ends with the exit code of the last. What it shall do is in its
environment. It lives as long as the head: a restart of the head ends it, and Ray then lists it as failed; an attempt
whose process is on another host goes on without it.
"""

import json
import signal
import sys
import time
from typing import Any

from cluster.job_client import job_client
from cluster.job_spec import HOLD_VARIABLE
from cluster.jobs import ENDED, POLL_SECONDS, STOPPED_EXIT_CODE, follow, request_job, state_of_job
from workbench.config import environment
from workbench.errors import Failure, UserError
from workbench.session import ClusterAddress

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray writes a job's runtime environment there, with the uploaded working directory's URI, and its id."""


def main() -> int:
    """Wait, submit, follow and submit again; the exit code of the last attempt."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    held = json.loads(environment(HOLD_VARIABLE) or "{}")
    config = json.loads(environment(JOB_CONFIG) or "{}")
    if not held or not config:
        raise UserError("this is the supervisor of a submitted job: use 'workbench submit --retries N -- COMMAND'")
    from ray.dashboard.utils import get_address_for_submission_client

    client = job_client(ClusterAddress("", get_address_for_submission_client(None), None))
    for job in held["after"]:
        wait_for(client, job)
    name = config["metadata"]["job_submission_id"]
    runtime_env = {**held["runtime_env"], "working_dir": config["runtime_env"]["working_dir"]}
    code = 1
    for number in range(1, held["retries"] + 2):
        attempt = f"{name}.{number}"
        code = run_attempt(client, attempt, {**held, "runtime_env": runtime_env})
        left = held["retries"] + 1 - number
        if code in (0, UserError.exit_code, STOPPED_EXIT_CODE):
            return code  # done, a mistake that stays one, or somebody's wish
        print(f"{attempt} ended with exit code {code}; " + f"{left} left to try",
              flush=True)  # fmt: skip
    return code


def wait_for(client: Any, job: str) -> None:
    """Return when ``job`` has succeeded. Raises Failure if it ends otherwise."""
    print(f"waiting for {job} to end", flush=True)
    while (state := state_of_job(client, job)) not in ENDED:
        time.sleep(POLL_SECONDS)
    if state != "SUCCEEDED":
        raise Failure(f"not started: {job} ended as {state}")


def run_attempt(client: Any, attempt: str, held: dict[str, Any]) -> int:
    """Submit an attempt, print its log, and stop it if we are stopped; its exit code."""
    print(f"starting {attempt}", flush=True)
    arguments = {"entrypoint": held["entrypoint"], "runtime_env": held["runtime_env"], **held["arguments"]}
    request_job(client, attempt, {**arguments, "metadata": {**held["metadata"], "part_of": attempt.rpartition(".")[0]}})
    try:
        return follow(client, attempt, write)
    except KeyboardInterrupt:
        client.stop_job(attempt)
        while state_of_job(client, attempt) not in ENDED:
            time.sleep(POLL_SECONDS)
        sys.exit(STOPPED_EXIT_CODE)


def write(text: str) -> None:
    """Hand on a piece of the attempt's log."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, Failure) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(STOPPED_EXIT_CODE)
