"""The shape of a command: a config class, a ``run(config, run) -> summary`` and a run folder around it.

A module may also have ``check(config)``: it raises UserError for what a look at the disk or the hub shows to be wrong,
and is called before there is a run folder or a Ray session.
"""

import importlib
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from workbench.config import Config, load
from workbench.errors import UserError
from workbench.interrupt import catch_signals, one_exit_code
from workbench.marks import phase
from workbench.redact import redact
from workbench.runs import Run, finish, open_run, reopen_run

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


Work = Callable[[Any, Run], dict[str, Any]]
"""``run(config, run) -> summary``."""


@dataclass(frozen=True)
class Command:
    """One ``workbench GROUP NAME``: the module that has its ``run``, imported only when it is called.

    ``positional`` is the config key that a bare argument fills; ``ray`` says whether it needs a Ray session, and
    ``dashboard`` whether one of its own needs Ray's dashboard, eight processes; ``gates`` that it has a key
    ``fail_on``, which ``--fail-on`` sets; ``plans`` that the module has ``plan(config)``, which ``--plan`` prints.
    ``varies`` names the figures of its summary that depend on the state it meets, and ``once`` says why running it
    again reproduces nothing, where that is so.
    """

    module: str
    help: str
    positional: str = ""
    ray: bool = True
    dashboard: bool = True
    gates: bool = False
    plans: bool = False
    varies: tuple[str, ...] = ()
    once: str = ""

    def schema(self) -> type[Config]:
        """The config class: the type of ``run``'s first parameter."""
        run = importlib.import_module(self.module).run
        schema: type[Config] = get_type_hints(run)["config"]
        return schema


def parse_arguments(command: Command, arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split ``[CONFIG.yaml] [key=value ...] [TEXT]`` into the file and the overrides, TEXT as the positional key.

    Raises UserError for an argument that is none of these.
    """
    file: Path | None = None
    overrides: list[str] = []
    text: list[str] = []
    for argument in arguments:
        if OVERRIDE.match(argument) and not (command.positional and _is_text(command, argument)):
            overrides.append(argument)
        elif argument.endswith((".yaml", ".yml")):
            if file is not None:
                raise UserError(f"two config files were given: {file} and {argument}; give one")
            file = Path(argument)
        elif command.positional:
            text.append(argument)
        else:
            raise UserError(f"'{argument}' is neither a config file (*.yaml) nor an override (key=value)")
    if text:
        overrides.append(f"{command.positional}={json.dumps(' '.join(text))}")
    return file, overrides


def _is_text(command: Command, argument: str) -> bool:
    """Whether ``argument`` has words after a key that the config lacks: ``lr=0.1 or lower?`` asks, it sets nothing."""
    key = argument.partition("=")[0].partition(".")[0]
    return " " in argument.strip() and key not in command.schema().model_fields


def execute(group: str, name: str, command: Command, arguments: Sequence[str], *, run_name: str, as_json: bool,
            recorder: str = "") -> None:  # fmt: skip
    """Run one command from its arguments: config, run folder, Ray session, summary, report.

    ``recorder`` names the module whose ``recording(run)`` samples the hosts meanwhile and whose ``add_to_report(run)``
    draws them; empty for none.
    Raises what the command raises, UserError for the user's mistakes.
    """
    file, overrides = parse_arguments(command, arguments)
    module = importlib.import_module(command.module)
    config = load(command.schema(), file, overrides)
    catch_signals()
    if hasattr(module, "check"):
        module.check(config)
    argv = [group, name, *arguments]
    with _aside(as_json), open_run(group, name, config, name=run_name, argv=argv) as run:
        dashboard = command.dashboard or bool(recorder)  # it names the actors that are recorded
        summary = _perform(run, module.run, config, ray=command.ray, dashboard=dashboard, recorder=recorder)
    show(summary, run.folder, as_json)


def go_on(folder: Path, work: Work, config: Config, *, argv: Sequence[str], as_json: bool) -> None:
    """Do ``work(config, run)`` in the run folder of a command that was cut short, as ``execute`` does.

    Raises what the work raises.
    """
    catch_signals()
    with _aside(as_json), reopen_run(folder, config, argv=argv) as run:
        summary = _perform(run, work, config, ray=True)
    show(summary, folder, as_json)


@contextmanager
def _aside(as_json: bool) -> Iterator[None]:
    """Ray prints what its daemons say on stdout, where --json promises nothing but the summary."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), one_exit_code():
        yield


def _perform(
    run: Run, work: Work, config: Config, *, ray: bool, dashboard: bool = True, recorder: str = ""
) -> dict[str, Any]:
    """The summary of ``work``, done in a Ray session where it needs one, with its report written.

    One that needs none, but is recorded, is attached to the cluster where there is one, so that its hosts are.
    """
    begun = time.monotonic()
    if ray:
        from workbench.session import connect, hosts
    with connect(dashboard) if ray else nullcontext(False) as run.owns_ray, _recorded(run, recorder, ray):
        catch_signals()  # Ray has put its own handler in place
        if ray:
            run.hosts(hosts())
        profiler = importlib.import_module(recorder) if recorder else None
        with profiler.recording(run) if profiler else nullcontext(), phase(run.command), run.marked_when_stopped():
            summary = work(config, run)
        if profiler:
            profiler.add_to_report(run)
    summary = redact({**summary, "seconds": round(time.monotonic() - begun, 1)})
    finish(run, summary)
    return summary


@contextmanager
def _recorded(run: Run, recorder: str, ray: bool) -> Iterator[None]:
    """Hold the connection that a recording of all hosts needs."""
    if ray or not recorder:
        yield
        return
    from workbench.session import attach

    with attach() as attached:
        if not attached:
            run.say("this host alone is recorded: no cluster is named (RAY_ADDRESS) or kept running here")
        yield


class Plan(Protocol):
    """What a module's ``plan(config)`` returns: an estimate of what a run will need."""

    def text(self) -> str:
        """For a person to read."""

    def to_json(self) -> dict[str, Any]:
        """The same for a program."""


def show_plan(command: Command, arguments: Sequence[str], as_json: bool) -> None:
    """Print what the run of these arguments would need. There is no run folder, and no Ray session.

    Raises UserError for a command that has no plan.
    """
    if not command.plans:
        raise UserError("this command has no --plan")
    file, overrides = parse_arguments(command, arguments)
    plan: Plan = importlib.import_module(command.module).plan(load(command.schema(), file, overrides))
    print(json.dumps(plan.to_json()) if as_json else plan.text())


def show(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the summary: as one JSON object and nothing else on stdout, or for a person to read."""
    if as_json:
        print(json.dumps({**summary, "run": str(folder)}, default=str))
        return
    scalars = {key: value for key, value in summary.items() if not isinstance(value, list)}
    for key, rows in summary.items():
        if key not in scalars:
            _show_rows(key, rows)
    width = max(map(len, scalars), default=0)
    for key, value in scalars.items():
        print(f"  {key:<{width}}  {_figure(value)}")
    print(f"run     {folder}\nreport  {folder / 'report.html'}")


def _show_rows(title: str, rows: list[Any]) -> None:
    """A list of a summary: the values of a row on one line, its longest text folded below them."""
    print(f"{title}:" + ("" if rows else " none"))
    for row in rows:
        values = list(row.values()) if isinstance(row, dict) else [row]
        longest = max(values, key=lambda value: len(str(value)), default="")
        below = longest if len(str(longest)) > 80 else None
        print("  " + "  ".join(_figure(value) for value in values if value is not below))
        if below is not None:
            print(textwrap.fill(str(below), width=110, initial_indent="      ", subsequent_indent="      "))


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
