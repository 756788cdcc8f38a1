"""``workbench submit -- COMMAND`` and ``workbench jobs list|logs|status|stop``."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.config import CHECKOUT, environment, runs_root
from workbench.errors import Failure, UserError
from workbench.interrupt import catch_signals
from workbench.session import ClusterAddress, dashboard_address

if TYPE_CHECKING:
    from cluster.job_spec import EntrypointResources
    from cluster.nodes import Node
    from workbench.resources import ResourceRequest

Address = Annotated[str | None, typer.Option(help="The cluster's dashboard, http://HOST:8265.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job id from 'workbench jobs list'.")]

jobs_app = typer.Typer(
    help="Jobs on the cluster: list, logs, status, stop.", no_args_is_help=True, rich_markup_mode=None
)


@dataclass(frozen=True)
class CommandFacts:
    """What the composition root knows of a command line: whether it has a ``resources`` key for its workers, and what
    they ask of these nodes, as placements' notes of what must be waited for (UserError where it can never be had)."""

    takes_resources: Callable[[Sequence[str]], bool]
    waits: Callable[[Sequence[str], "Sequence[Node]"], list[str]]
    requests: Callable[[Sequence[str]], str]
    cards: Callable[[Sequence[str]], float]


def submit_command(facts: CommandFacts) -> Callable[..., int]:
    """The function behind ``workbench submit``."""

    def submit(
        context: typer.Context,
        command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="For example: -- data audit")],
        address: Address = None,
        name: Annotated[str, typer.Option(help="The job's id; random if not given.")] = "",
        gpu: Annotated[str, typer.Option(help="One card: rtx-5090, any, or '>=24GB'.")] = "",
        gpus: Annotated[str, typer.Option(help="'all on HOST', or a number of plain cards of one host.")] = "",
        share: Annotated[float | None, typer.Option(help="Share of that card.", show_default=False)] = None,
        mps: Annotated[bool, typer.Option("--mps", help="The Mac's own GPU.")] = False,
        cpus: Annotated[float | None, typer.Option(help="CPUs.", show_default=False)] = None,
        host: Annotated[str, typer.Option(help="Only on this host.")] = "",
        memory: Annotated[int, typer.Option(min=0, help="Memory in MiB that the command's own process reserves.")] = 0,
        resource: Annotated[list[str] | None, typer.Option(help="NAME=AMOUNT of a Ray resource, likewise.")] = None,
        env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for every process of the job.")] = None,
        secret: Annotated[list[str] | None, typer.Option(help="A NAME of the hosts' secrets file.")] = None,
        after: Annotated[list[str] | None, typer.Option(help="Start when this JOB has succeeded.")] = None,
        retries: Annotated[int, typer.Option(min=0, help="Try again so often when the command fails.")] = 0,
        runs: Annotated[Path | None, typer.Option(help="The cluster's absolute runs root.", show_default=False)] = None,
        max_upload: Annotated[float, typer.Option(help="MB of this checkout that may travel.")] = 100,
        follow: Annotated[
            bool, typer.Option("--follow/--detach", help="Follow the log, or return when the job is accepted.")
        ] = True,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the same as a plain Ray line.")] = False,
        as_json: AsJson = False,
    ) -> int:
        """Run any workbench command as a Ray job on the cluster; its exit code is ours.

        --gpu, --gpus, --share, --mps, --cpus and --host are what the command's workers get, as its 'resources' key;
        of a command without that key, what its own process gets.
        """
        from cluster.job_client import job_client
        from cluster.job_spec import EntrypointResources, JobSpec, check_name, refuse_secrets
        from cluster.jobs import random_name, submit_spec
        from cluster.nodes import remote_nodes
        from cluster.upload import check_upload

        check_name(name)
        variables = _variables(env or [])
        refuse_secrets(command, variables)
        check_command(context.find_root(), command)
        cluster = dashboard_address(address)
        root = runs_root_for(cluster, runs)
        request = _request(gpu=gpu, gpus=gpus, share=share, mps=mps, cpu=cpus, host=host)
        custom = _custom(resource or [])
        if request is not None and facts.takes_resources(command):
            command = [*command, _override(request)]
            request = None
        workers, cards = facts.requests(command), facts.cards(command)
        nodes = remote_nodes(cluster)
        for text in facts.waits(command, nodes):
            print(f"the workers' request {text}", file=sys.stderr)
        _refuse_what_nobody_has(nodes, memory << 20, custom)
        own = EntrypointResources(memory=memory << 20, custom=custom)
        if request is not None:
            own = _entrypoint(request, nodes, memory << 20, custom)
        spec = JobSpec(command, root, own, variables, secret or [], after or [], retries, workers, cards)
        if dry_run:
            print(spec.plain_line(cluster.dashboard, name))
            return 0
        check_upload(CHECKOUT, max_upload)
        client = job_client(cluster)
        job = name or random_name()
        catch_signals()
        try:
            submit_spec(client, spec, job)
        except SystemExit:
            print(f"stopped while submitting {job}; if it was accepted, {_how_to_stop(job)}", file=sys.stderr)
            raise
        print(f"job {job} submitted to {cluster.dashboard}", file=sys.stderr)
        return _follow(client, job, as_json) if follow else _say_accepted(job, as_json)

    return submit


def _follow(client: Any, job: str, as_json: bool, *, interruptible: bool = True) -> int:
    """Follow the log to the job's end; Ctrl-C asks about an ``interruptible`` job and leaves another alone. SIGTERM
    ends the following and not the job."""
    from cluster.jobs import follow

    write = sys.stderr.write if as_json else sys.stdout.write
    try:
        code = follow(client, job, write)
    except KeyboardInterrupt:
        if not interruptible:
            raise
        return _interrupted(client, job)
    except SystemExit:
        print(f"no longer following {job}, which goes on; {_how_to_stop(job)}", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps({"job": job, "exit_code": code}))
    return code


def _how_to_stop(job: str) -> str:
    return f"stop it with: workbench jobs stop {job}"


def _say_accepted(job: str, as_json: bool) -> int:
    print(json.dumps({"job": job}) if as_json else job)
    return 0


def _request(*, gpu: str, gpus: str, **rest: Any) -> "ResourceRequest | None":
    """The request that the flags make, or None without any. Raises UserError with the flags' names."""
    from pydantic import ValidationError

    from workbench.resources import ResourceRequest

    asked: dict[str, Any] = {key: value for key, value in rest.items() if value not in (None, False, "")}
    if gpu:
        asked["gpu"] = {"memory": gpu} if gpu.startswith(">") else gpu
    if gpus:
        asked["gpus"] = int(gpus) if gpus.isdigit() else gpus
    if "mps" in asked:
        asked["mps"] = 1
    if not asked:
        return None
    try:
        return ResourceRequest.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        flag = {"cpu": "cpus"}.get(str(first["loc"][0]), first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--{flag}: {message}" if flag else message) from None


def _override(request: "ResourceRequest") -> str:
    return f"resources={json.dumps(request.model_dump(exclude_defaults=True) or 'cpu only')}"


def _entrypoint(
    request: "ResourceRequest", nodes: "Sequence[Node]", memory: int, custom: dict[str, float]
) -> "EntrypointResources":
    from cluster.job_spec import EntrypointResources
    from cluster.placement import place

    placement = place(request, nodes)
    if placement.waits:
        print(f"the command's own process {placement.waits}", file=sys.stderr)
    text = str(request) if request.cpu is not None or request.device != "cpu" else ""
    return EntrypointResources.of(placement, memory, custom, text)


@jobs_app.command("list")
def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """Every job the cluster remembers, newest first."""
    from cluster.jobs import describe, joules_of
    from workbench.cost import cost_text

    client = _client(address)
    rows = [describe(job, joules_of(client, job)) for job in client.list_jobs() if job.submission_id]
    rows.sort(key=lambda row: row["started"], reverse=True)
    if as_json:
        print(json.dumps(rows))
        return
    shape = "{:<24} {:<10} {:<18} {:>8} {:>8} {:>5}  {:<28} {:<20} {}"
    print(shape.format("JOB", "STATE", "OWNER", "AGE", "TOOK", "EXIT", "RESOURCES", "COST", "COMMAND"))
    for row in rows:
        code = "" if row["exit_code"] is None else str(row["exit_code"])
        times = [_duration(row["age"]), _duration(row["seconds"])]
        paid = cost_text(row["cost"])
        print(
            shape.format(row["job"], row["state"], row["owner"], *times, code, row["resources"], paid, row["command"])
        )


def _duration(seconds: float) -> str:
    """Short for a person: 42s, 12m, 3.5h, 2.1d."""
    for unit, length in (("d", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f}{unit}"
    return f"{seconds // 60:.0f}m" if seconds >= 60 else f"{seconds:.0f}s"


@jobs_app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends, with its exit code.")] = False,
    as_json: AsJson = False,
) -> int:
    """Print a job's log; with --follow until it ends, with its exit code."""
    client = _client(address)
    _info(client, job)
    if follow:
        catch_signals()
        return _follow(client, job, as_json, interruptible=False)
    log = client.get_job_logs(job)
    print(json.dumps({"job": job, "log": log}) if as_json else log, end="\n" if as_json else "")
    return 0


@jobs_app.command()
def status(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """One job: state, owner, command, resources, times, exit code, and what it waits for."""
    from cluster.jobs import describe, waits_for
    from cluster.nodes import remote_nodes

    client = _client(address)
    details = _info(client, job)
    waits = waits_for(client, details, lambda: remote_nodes(dashboard_address(address)))
    row = {**describe(details), "waits_for": waits}
    if as_json:
        print(json.dumps(row))
        return
    for key, value in row.items():
        if value not in (None, ""):
            print(f"{key:<10} {value}")


@jobs_app.command()
def stop(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Stop a job: SIGTERM, so that its run folder says interrupted, then SIGKILL."""
    client = _client(address)
    _info(client, job)
    stopping = bool(client.stop_job(job))
    if as_json:
        print(json.dumps({"job": job, "stopping": stopping}))
    else:
        print(f"stopping {job}" if stopping else f"{job} had already ended")


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
        amounts = {name: float(amount) for name, amount in (pair.split("=", 1) for pair in pairs)}
        if not all(0 < amount < math.inf for amount in amounts.values()):
            raise ValueError("an amount is a positive number")
    except ValueError:
        raise UserError(f"--resource {' '.join(pairs)}: write NAME=AMOUNT, for example mps=1") from None
    return amounts


def _refuse_what_nobody_has(nodes: "Sequence[Node]", memory: int, custom: dict[str, float]) -> None:
    """Raise UserError for what no host of the cluster has even when idle: Ray would wait for it for ever."""
    for name, amount in {**({"memory": memory} if memory else {}), **custom}.items():
        most = max((node.total.get(name, 0) for node in nodes), default=0)
        if amount > most and name == "memory":
            raise UserError(f"--memory {memory >> 20}: no host has more than {int(most) >> 20} MiB for Ray")
        if amount > most:
            there = sorted({key for node in nodes for key in node.total if ":" not in key})
            raise UserError(
                f"--resource {name}={amount:g}: no host has more than {most:g} of it; there is {', '.join(there)}"
            )


def _variables(pairs: list[str]) -> dict[str, str]:
    parsed = [pair.partition("=") for pair in pairs]
    for name, equals, _ in parsed:
        if not equals or not name.isidentifier():
            raise UserError(f"--env {name}: write NAME=VALUE")
    return {name: value for name, _, value in parsed}


def check_command(root: Any, command: Sequence[str]) -> None:
    """Read the command line as the job would, with the parser of this very program (its ``root`` context).

    Raises click's errors for an unknown command or option, UserError for a config file that would not travel.
    """
    group, words = root.command, list(command)
    context = root
    while hasattr(group, "resolve_command"):
        name, found, words = group.resolve_command(context, words)
        context = found.make_context(name, words, parent=context)
        group, words = found, [*context._protected_args, *context.args]
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
