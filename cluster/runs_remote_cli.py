"""``workbench runs list`` and ``pull``: the two commands on runs that also reach a cluster's runs root."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.jobs_cli import Address, runs_root_for
from workbench.config import runs_root
from workbench.errors import UserError
from workbench.runs_cli import AsJson, RunArgument, known_kinds, nearest, print_rows
from workbench.session import dashboard_address

STATES = ["running", "finished", "failed", "interrupted", "lost", "damaged"]
MAX_FILE_MIB = 64

ClusterRoot = Annotated[
    Path | None, typer.Option("--runs", help="The cluster's absolute runs root.", show_default=False)
]


def list_runs(
    kind: Annotated[str, typer.Option(help="Only runs of this GROUP-COMMAND.")] = "",
    state: Annotated[str, typer.Option(help=f"Only runs that are {', '.join(STATES)}.")] = "",
    address: Address = None,
    runs: ClusterRoot = None,
    as_json: AsJson = False,
) -> None:
    """Recorded runs, oldest first: id, state, start, seconds, commit (* with changes), a few figures.

    With --address, the runs of that cluster.
    """
    if state and state not in STATES:
        raise UserError(f"no state '{state}'{nearest(state, STATES)}")
    if address is not None or runs is not None:
        rows = _remote_rows(address, runs, kind, state)
    else:
        rows = _local_rows(kind, state)
    print_rows(rows, as_json)


def _local_rows(kind: str, state: str) -> list[dict[str, Any]]:
    from workbench.run_records import record_row
    from workbench.runs import find_runs

    if kind and kind not in (known := known_kinds()):
        raise UserError(f"no runs of kind '{kind}'{nearest(kind, known)}")
    rows = [record_row(folder) for folder in find_runs() if not kind or folder.parent.name == kind]
    return [row for row in rows if not state or row["state"] == state]


def _remote_rows(address: str | None, runs: Path | None, kind: str, state: str) -> list[dict[str, Any]]:
    from cluster.job_client import job_client
    from cluster.runs_remote import list_rows

    cluster = dashboard_address(address)
    filters = [f"--{name}={value}" for name, value in (("kind", kind), ("state", state)) if value]
    return list_rows(job_client(cluster), filters, runs_root_for(cluster, runs))


def pull(
    run: RunArgument,
    address: Address = None,
    runs: ClusterRoot = None,
    to: Annotated[Path | None, typer.Option(help="The runs root to copy to; this machine's if not given.")] = None,
    max_size: Annotated[int, typer.Option(help="Leave out files of more MiB than this; 0 takes all.")] = MAX_FILE_MIB,
    as_json: AsJson = False,
) -> None:
    """Copy a run to this machine: from a cluster through its job API, or from a folder that is mounted here."""
    import json

    target = to.resolve() if to is not None else runs_root()
    left_out: dict[str, int] = {}
    if (mounted := Path(run).expanduser()).is_absolute() and (mounted / "status.json").is_file():
        from cluster.runs_remote import copy

        folder = copy(mounted.resolve(), target)
    else:
        from cluster.job_client import job_client
        from cluster.runs_remote import pull as pull_run

        cluster = dashboard_address(address)
        limit = max_size << 20 if max_size else None
        archive = pull_run(job_client(cluster), run, runs_root_for(cluster, runs), target, limit)
        folder, left_out = target / archive.run, archive.left_out
    for name, size in left_out.items():
        print(f"left out {name}: {size / 2**20:.1f} MiB (--max-size 0 takes it)", file=sys.stderr)
    print(json.dumps({"folder": str(folder), "left_out": left_out}) if as_json else folder)


def send(
    run: RunArgument,
    max_bytes: Annotated[int | None, typer.Option(help="Leave out files of more bytes than this.")] = None,
) -> None:
    """Print a run as a marked archive: the cluster's half of ``pull``."""
    from cluster.runs_remote import send as send_run
    from workbench.runs import resolve_run, run_id

    folder = resolve_run(run)
    for line in send_run(folder, run_id(folder), max_bytes):
        print(line)
