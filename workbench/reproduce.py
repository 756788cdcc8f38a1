"""``workbench runs reproduce``: a run's command again, from its recorded config.

What of a summary must come out the same: not how long things took, and not what a command says depends on the state it
meets (``Command.varies``). A command whose figures are all measured, or that makes a state, is refused
(``Command.once``).
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.commands import Command
from workbench.config import load
from workbench.errors import Failure, UserError
from workbench.redact import MASK
from workbench.runs import resolve_run, state_of
from workbench.runs_cli import AsJson, RunArgument, print_differences

TIMING = re.compile(r"(^|[_.])(seconds|ms|latency|ttft|tpot|throughput|per_second|per_minute|per_s)([_.]|$)|_s$")
"""Summary figures that a rerun need not repeat: how long something took."""


def is_timing(key: str) -> bool:
    """Whether a summary figure says how long something took."""
    return bool(TIMING.search(key))


def reproduce_command(command_of: Callable[[Sequence[str]], Command | None]) -> Callable[..., int]:
    """The command, for the commands that ``command_of`` finds by ``[group, name]``."""

    def reproduce(
        run: RunArgument,
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
        as_json: AsJson = False,
    ) -> int:
        """Run a run's command again from its recorded config; exit code 1 if a figure of the summary differs.

        How long things took (seconds, ..._per_second, latency), and what depends on the state that the command met, is
        shown apart and does not count.
        """
        from workbench.run_records import Record, changes_since, differing, flatten

        recorded = Record.read(resolve_run(run))
        if (state := state_of(recorded.folder)) != "finished":
            raise UserError(f"{recorded.id} is {state}: only a finished run has figures to reproduce")
        line = recorded.status["command"].split()
        if line == ["workbench", "demo"]:
            raise UserError(f"repeat a demo with: workbench demo --fresh --seed {recorded.config.get('seed', 17)}")
        command = command_of(line)
        if command is None:
            raise UserError(f"{recorded.id} is of '{' '.join(line)}', which is no command of this workbench")
        if command.once:
            raise UserError(f"{recorded.id} cannot be reproduced: {command.once}")
        _check(command, recorded.folder, overrides or [])
        warnings = changes_since(recorded)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        again = Record.read(_run_again(line, recorded.folder, overrides or []))
        rows = differing([flatten(recorded.figures()), flatten(again.figures())])
        timing = [row for row in rows if is_timing(row["key"])]
        varying = [row for row in rows if row["key"] in command.varies and row not in timing]
        figures = [row for row in rows if row not in timing and row not in varying]
        if as_json:
            result = {"run": recorded.id, "again": again.id, "same": not figures, "differences": figures}
            print(json.dumps({**result, "timing": timing, "varying": varying, "warnings": warnings}, default=str))
        else:
            print(f"1: {recorded.id}\n2: {again.id}")
            print("every figure is the same" if not figures else f"{len(figures)} figures differ:")
            print_differences(figures)
            _print_apart("how long it took:", timing)
            _print_apart("what depends on what was there before:", varying)
        return 1 if figures else 0

    return reproduce


def _print_apart(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        print(title)
        print_differences(rows)


def _check(command: Command, folder: Path, overrides: list[str]) -> None:
    """Raise UserError for a config that is not valid with ``overrides``, or whose secret was masked."""
    from workbench.run_records import flatten

    config = load(command.schema(), folder / "config.yaml", overrides)
    for key, value in flatten(config.model_dump(mode="json")).items():
        if isinstance(value, str) and MASK in value:
            raise UserError(f"the record of {key} holds no secret: give it again, as {key}=VALUE")


def _run_again(command: list[str], folder: Path, overrides: list[str]) -> Path:
    """Run ``workbench COMMAND`` on a run's recorded config in a process of its own; the new run folder."""
    argv = [sys.executable, "-m", "workbench", *command, str(folder / "config.yaml"), *overrides, "--json"]
    print(f"running: workbench {shlex.join(argv[3:])}", file=sys.stderr)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:  # Ctrl-C reached the command too, SIGTERM did not: let it end in order
            process.terminate()
            process.wait()
            raise
    if process.returncode == UserError.exit_code:
        raise UserError(f"'workbench {' '.join(command)}' refused it, for the reason above")
    if process.returncode != 0:
        raise Failure(f"the command ended with exit code {process.returncode}")
    return Path(json.loads(output.splitlines()[-1])["run"])
