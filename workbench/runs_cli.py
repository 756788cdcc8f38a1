"""``workbench runs show|compare|prune``; ``list``, ``pull`` and ``reproduce`` look further and join in cli.py."""

import json
import sys
from typing import Annotated, Any

import typer
import yaml

from workbench.errors import UserError
from workbench.runs import resolve_run, state_of

runs_app = typer.Typer(
    help="Recorded runs: read, compare, repeat, delete.", no_args_is_help=True, rich_markup_mode=None
)

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="GROUP-COMMAND/TIME-NAME, its last part, GROUP-COMMAND/latest, or a folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Runs as ``record_row`` gives them: as JSON, or a line each."""
    from workbench.cost import cost_text
    from workbench.run_records import few_figures

    if as_json:
        print(json.dumps(rows, default=str))
        return
    width = max((len(row["id"]) for row in rows), default=0)
    for row in rows:
        commit = row["commit"][:8] + ("" if row["clean"] or not row["commit"] else "*")
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        line = f"{row['id']:<{width}}  {row['state']:<11}  {row['started'][:16]}  {seconds:>10}  {commit:<9}"
        print("  ".join(filter(None, [line, cost_text(row.get("cost")), few_figures(row["summary"])])).rstrip())
    if not rows:
        print("no runs", file=sys.stderr)


@runs_app.command()
def show(run: RunArgument, as_json: AsJson = False) -> None:
    """One run: how it ended, its config, environment, inputs and summary."""
    from workbench.run_records import Record

    record = Record.read(resolve_run(run))
    status = {**record.status, "state": state_of(record.folder)}
    parts = {
        "status": status,
        "summary": record.summary,
        "config": record.config,
        "environment": record.environment,
        "inputs": record.inputs,
    }
    if as_json:
        print(json.dumps({"id": record.id, "folder": str(record.folder), **parts}, default=str))
        return
    print(f"{record.id}\n{record.folder}")
    for title, part in parts.items():
        text = yaml.safe_dump(part, sort_keys=False, allow_unicode=True) if part else "(none)\n"
        print(f"\n{title}\n" + "".join(f"  {line}\n" for line in text.splitlines()), end="")


@runs_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more; the first is the base.")],
    as_json: AsJson = False,
) -> None:
    """What differs between runs: config, environment, inputs, and the summary's figures with their differences."""
    from workbench.run_records import Record, differences

    if len(runs) < 2:
        raise UserError("give two runs to compare; 'workbench runs list' names them")
    records = [Record.read(resolve_run(run)) for run in runs]
    parts = differences(records)
    if as_json:
        print(json.dumps({"runs": [record.id for record in records], **parts}, default=str))
        return
    for number, record in enumerate(records, 1):
        print(f"{number}: {record.id}")
    for title, rows in parts.items():
        print(f"\n{title}: {'the same' if not rows else ''}".rstrip())
        print_differences(rows)


def print_differences(rows: list[dict[str, Any]]) -> None:
    """Rows of ``differing``, a line each."""
    width = max((len(row["key"]) for row in rows), default=0)
    for row in rows:
        line = f"  {row['key']:<{width}}  {' | '.join(_text(value) for value in row['values'])}"
        for difference, relative in zip(row.get("difference", []), row.get("relative", []), strict=True):
            line += f"  ({difference:+.4g}{'' if relative is None else f', {relative:+.1%}'})"
        print(line)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@runs_app.command()
def prune(
    keep: Annotated[int | None, typer.Option(min=1, help="Keep this many of each kind, the newest.")] = None,
    older_than: Annotated[float | None, typer.Option(min=0, help="Only runs that started so many days ago.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only runs of this GROUP-COMMAND.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old runs: never a running one, nor the newest finished one of a kind."""
    from workbench.run_records import prunable, remove, size_bytes
    from workbench.runs import run_id

    if keep is None and older_than is None:
        raise UserError("say which runs may go: --keep N, --older-than DAYS, or both")
    known = known_kinds()
    if kind is not None and kind not in known:
        raise UserError(f"no runs of kind '{kind}'{nearest(kind, known)}")
    folders = prunable(keep, older_than, kind)
    rows: list[dict[str, Any]] = [{"id": run_id(folder), "bytes": size_bytes(folder)} for folder in folders]
    if yes:
        for folder in folders:
            remove(folder)
    if as_json:
        print(json.dumps({"deleted": yes, "runs": rows}))
        return
    for row in rows:
        print(f"{'deleted' if yes else 'would delete'}  {row['bytes'] / 2**20:>9.1f} MiB  {row['id']}")
    if rows and not yes:
        print("nothing was deleted; add --yes to delete these", file=sys.stderr)


def known_kinds() -> list[str]:
    """Every ``group-command`` that has a run."""
    from workbench.runs import find_runs

    return sorted({folder.parent.name for folder in find_runs()})


def nearest(word: str, known: list[str]) -> str:
    """A hint for a message: the known word nearest to ``word``, or all of them."""
    import difflib

    if near := difflib.get_close_matches(word, known, 1):
        return f"; did you mean '{near[0]}'?"
    return f"; there are: {', '.join(known)}" if known else "; there are none"
