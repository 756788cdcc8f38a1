"""``workbench submit -- COMMAND`` and ``workbench jobs list|logs|status|stop``."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.config import CHECKOUT, environment, runs_root
from workbench.errors import Failure, UserError
from workbench.session import ClusterAddress, dashboard_address

Address = Annotated[str | None, typer.Option(help="The cluster's dashboard, http://HOST:8265.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job id from 'workbench jobs list'.")]

jobs_app = typer.Typer(
    help="Jobs on the cluster: list, logs, status, stop.", no_args_is_help=True, rich_markup_mode=None
)


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="For example: -- data audit")],
    address: Address = None,
    name: Annotated[str, typer.Option(help="The job's id; random if not given.")] = "",
    cpus: Annotated[float, typer.Option(help="CPUs that the command's own process reserves.")] = 0,
    gpus: Annotated[float, typer.Option(help="GPUs that the command's own process reserves.")] = 0,
    memory: Annotated[int, typer.Option(help="Memory in MiB that it reserves.")] = 0,
    resource: Annotated[list[str] | None, typer.Option(help="NAME=AMOUNT of a custom resource.")] = None,
    runs: Annotated[Path | None, typer.Option(help="The cluster's absolute runs root.", show_default=False)] = None,
    detach: Annotated[bool, typer.Option(help="Return as soon as the job is accepted.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run any workbench command as a Ray job on the cluster; its exit code is ours."""
    from cluster.job_client import job_client
    from cluster.jobs import EntrypointResources, follow
    from cluster.jobs import submit as submit_job

    cluster = dashboard_address(address)
    root = runs_root_for(cluster, runs)
    asked = EntrypointResources(cpus, gpus, memory << 20, _custom(resource or []))
    _check_command(command)
    client = job_client(cluster)
    job = submit_job(client, command, runs_root=root, name=name, resources=asked)
    print(f"job {job} submitted to {cluster.dashboard}", file=sys.stderr)
    if detach:
        print(json.dumps({"job": job}) if as_json else job)
        return 0
    write = sys.stderr.write if as_json else sys.stdout.write
    try:
        code = follow(client, job, write)
    except KeyboardInterrupt:
        return _interrupted(client, job)
    if as_json:
        print(json.dumps({"job": job, "exit_code": code}))
    return code


@jobs_app.command("list")
def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """Every job the cluster remembers, newest first."""
    from cluster.jobs import describe

    rows = [describe(job) for job in _client(address).list_jobs() if job.submission_id]
    rows.sort(key=lambda row: row["started"], reverse=True)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        code = "" if row["exit_code"] is None else f"exit {row['exit_code']}"
        times = f"{row['started']}  {row['seconds']:>8.1f} s"
        print(f"{row['job']:<28} {row['state']:<10} {times}  {code:<8} {row['command']}")


@jobs_app.command()
def logs(job: JobId, address: Address = None, follow: Annotated[bool, typer.Option("--follow", "-f")] = False) -> int:
    """Print a job's log; with --follow until it ends, with its exit code."""
    client = _client(address)
    _info(client, job)
    if not follow:
        print(client.get_job_logs(job), end="")
        return 0
    from cluster.jobs import follow as follow_job

    return follow_job(client, job, sys.stdout.write)


@jobs_app.command()
def status(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """One job: state, command, times, exit code."""
    from cluster.jobs import describe

    row = describe(_info(_client(address), job))
    if as_json:
        print(json.dumps(row))
        return
    for key, value in row.items():
        print(f"{key:<10} {'' if value is None else value}")


@jobs_app.command()
def stop(job: JobId, address: Address = None) -> None:
    """Stop a job: SIGTERM, so that its run folder says interrupted, then SIGKILL."""
    client = _client(address)
    _info(client, job)
    print(f"stopping {job}" if client.stop_job(job) else f"{job} had already ended")


def _client(address: str | None) -> Any:
    from cluster.job_client import job_client

    return job_client(dashboard_address(address))


def _info(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error):
            raise UserError(f"no job '{job}' on this cluster; see 'workbench jobs list'") from None
        raise Failure(str(error)) from None


def runs_root_for(cluster: ClusterAddress, given: Path | None) -> Path:
    """The cluster's runs root: as given, or ours where the cluster is on this machine or the variable names one.

    Raises UserError if it is relative or not known.
    """
    if given is not None:
        if not given.is_absolute():
            raise UserError(f"--runs {given}: give an absolute path on the cluster")
        return given
    if cluster.runs_root is not None:
        return cluster.runs_root
    here = not cluster.remote and cluster.dashboard.startswith(("http://127.0.0.1:", "http://localhost:"))
    if environment("WORKBENCH_RUNS_ROOT") or here:
        return runs_root()
    raise UserError("the cluster is on other machines: name its runs root, --runs /shared/runs or WORKBENCH_RUNS_ROOT")


def _custom(pairs: list[str]) -> dict[str, float]:
    try:
        return {name: float(amount) for name, amount in (pair.split("=", 1) for pair in pairs)}
    except ValueError:
        raise UserError(f"--resource {' '.join(pairs)}: write NAME=AMOUNT, for example mps=1") from None


def _check_command(command: list[str]) -> None:
    for argument in command:
        if (
            argument.endswith((".yaml", ".yml"))
            and not argument.startswith("/")
            and not (CHECKOUT / argument).is_file()
        ):
            raise UserError(f"{argument} is not in this checkout ({CHECKOUT}), so the job would not have it")


def _interrupted(client: Any, job: str) -> int:
    """Ctrl-C while following: ask a person; where there is none to ask, stop the job."""
    answer = "s"
    if sys.stdin.isatty():
        print(f"\n[s] stop {job}, or [f] only stop following it? ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip().lower() or "f"
    if answer.startswith("s"):
        client.stop_job(job)
        print(f"stopping {job}", file=sys.stderr)
    else:
        print(f"{job} goes on; follow it again with: workbench jobs logs --follow {job}", file=sys.stderr)
    return 130
