"""``workbench tune resume|pause|stop|extend|report|dashboard``: orders to a sweep are left in its study.

workbench tune pause tune-run/20261121T120000
workbench tune extend tune-run/20261121T120000 --trials 24
workbench tune resume tune-run/20261121T120000
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune.sole import is_driven, sole_driver
from workbench.config import load, read_value
from workbench.errors import UserError
from workbench.files import read_record
from workbench.interrupt import catch_signals
from workbench.runs import resolve_run, run_id, state_of

if TYPE_CHECKING:
    from tune.config import SweepConfig
    from tune.study import SweepStudy

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="tune-run/TIME-NAME, its last part, or the folder of a sweep.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]

InventoryFile = Annotated[
    Path | None, typer.Option("--inventory", help="Of the cluster; default: cluster.yaml here, else the last one used.")
]

SILENT_SECONDS = 60.0
"""After so long without a sign of life, a driver on another host is taken for dead."""


def _sweep(reference: str) -> "tuple[Path, SweepConfig, SweepStudy]":
    """The folder, config and study of a sweep. Raises UserError for a run that is none."""
    from tune.config import SweepConfig
    from tune.study import FILE, SweepStudy

    folder = resolve_run(reference)
    if (read_record(folder / "status.json") or {}).get("command") != "tune run":
        raise UserError(f"{run_id(folder)} is no sweep; 'workbench runs list' names those of tune-run")
    config = load(SweepConfig, folder / "config.yaml", visit_paths=False)
    if not (folder / FILE).is_file():
        began = "has not begun its first trial yet" if state_of(folder) == "running" else "ended before its first trial"
        raise UserError(f"{run_id(folder)} {began}; to begin anew: workbench tune run {folder / 'config.yaml'}")
    return folder, config, SweepStudy(folder, config.metrics)


def _sweep_to_order(reference: str) -> "tuple[Path, SweepConfig, SweepStudy]":
    """The same of a sweep whose study can be written to. Raises UserError for another."""
    folder, config, study = _sweep(reference)
    if study.is_torn:
        raise UserError(f"{study.file} ends amid a line, which its driver drops: {_typed('resume', folder)}")
    return folder, config, study


def _runs(folder: Path, study: "SweepStudy") -> bool:
    """Whether a driver is at work on the sweep, here or on another host."""
    silent = time.time() - study.note("alive", {}).get("at", 0.0)
    return is_driven(folder) or (state_of(folder) == "running" and silent < SILENT_SECONDS)


def resume(run: RunArgument, as_json: AsJson = False) -> None:
    """Go on with a sweep that was cut short, paused or extended: finished trials stay as they are."""
    import tune.sweep
    from workbench.commands import go_on

    folder, config, study = _sweep(run)
    if _runs(folder, study):
        raise UserError(f"{run_id(folder)} is running: there is nothing to resume")
    with sole_driver(folder):
        go_on(folder, tune.sweep.resume, config, argv=["tune", "resume", run], as_json=as_json)


def pause(run: RunArgument) -> None:
    """Have the trials of a sweep write checkpoints and end, and the sweep with them; resume goes on."""
    folder, _, study = _sweep_to_order(run)
    if not _runs(folder, study):
        raise UserError(f"{run_id(folder)} is {state_of(folder)}, not running")
    study.write_note("pause", time.time())
    print("it pauses where its trials report next; go on with: " + _typed("resume", folder), file=sys.stderr)


def stop(
    run: RunArgument, trials: Annotated[list[int], typer.Argument(metavar="TRIAL...", help="Their numbers.")]
) -> None:
    """Stop trials of a sweep for good; the others go on."""
    folder, _, study = _sweep_to_order(run)
    known = {trial.number: trial for trial in study.trials()}
    for number in trials:
        if number not in known:
            raise UserError(f"{run_id(folder)} has no trial {number}; it has {', '.join(map(str, known)) or 'none'}")
        if known[number].ended:
            raise UserError(f"trial {number} has ended: {known[number].state}")
    if _runs(folder, study):
        study.write_note("stop", sorted({*study.note("stop", []), *trials}))
        print("they stop where they report next", file=sys.stderr)
        return
    for number in trials:
        study.end(number, "stopped", "by the user")


def extend(
    run: RunArgument,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all.")] = None,
    hours: Annotated[float | None, typer.Option(min=0, help="Hours on the clock in all.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=0, help="Hours of cards in all.")] = None,
    target: Annotated[float | None, typer.Option(help="Another value that is good enough.")] = None,
    add: Annotated[str, typer.Option(metavar="'{KEY: VALUE}'", help="A point to run next.")] = "",
) -> None:
    """Give a sweep a larger budget, or a point of your own; one that runs learns it at once. Where its target was
    reached, trials go on until another reaches it."""
    folder, config, study = _sweep_to_order(run)
    asked = {"trials": trials, "hours": hours, "gpu_hours": gpu_hours, "target": target}
    given = {key: value for key, value in asked.items() if value is not None}
    if not given and not add:
        raise UserError("say what it gets: --trials, --hours, --gpu-hours, --target or --add")
    _check_more(config, study, given)
    if add:
        _add(config, study, add)
    if given:
        study.write_note("budget", {**study.note("budget", {}), **given})
    if study.note("reached"):  # what comes now is to run
        study.write_note("reached", None)
    if not _runs(folder, study):
        print("go on with: " + _typed("resume", folder), file=sys.stderr)


def dashboard(
    run: RunArgument,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the study's page, on loopback; 0: a free one.")
    ] = 8080,
    cluster: Annotated[bool, typer.Option("--cluster", help="A sweep on the cluster, through ssh.")] = False,
    inventory: InventoryFile = None,
) -> None:
    """Show a sweep in a browser while it runs: its study, its curves, its cluster."""
    try:
        if cluster:
            from cluster.client_state import inventory_in_use
            from tune.remote_dashboard import serve_from

            catch_signals()  # the job that serves ends with a command that is terminated, too
            serve_from(inventory_in_use(inventory)[0], run, lambda line: print(line, flush=True))
            return
        _serve_here(run, port)
    except KeyboardInterrupt:
        pass


def _serve_here(run: str, port: int) -> None:
    from tune.dashboard import serve

    folder, _, study = _sweep(run)
    ray = study.note("ray", "") if _runs(folder, study) else ""
    try:
        serve(folder, port, ray, lambda line: print(line, flush=True))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; give another with --port") from None


def report(run: RunArgument) -> None:
    """Write the report of a sweep as it is now, also while it runs."""
    from tune.report import write_report
    from tune.sweep import summary_of
    from workbench.runs import Run

    folder, config, study = _sweep(run)
    trials = study.trials()
    best = study.best(trials)
    shown = Run(folder, config, "tune run")
    facts = study.note("payload", {}).get("facts", {})
    shown.report.summary = summary_of(config, trials, best, "", facts)
    write_report(config, shown, study, best)
    shown.report.write(folder / "report.html")
    print(folder / "report.html")


def _check_more(config: "SweepConfig", study: "SweepStudy", given: dict[str, float]) -> None:
    """Raise UserError for what is no number, or less than the sweep has: trials that have run cannot be taken back."""
    has = {**config.budget.model_dump(), **study.note("budget", {})}
    for key, value in given.items():
        option = f"--{key.replace('_', '-')}"
        if not math.isfinite(value):
            raise UserError(f"{option} {value}: give a number")
        if key != "target" and has[key] is not None and value < has[key]:
            raise UserError(f"{option} {value:g}: it has {has[key]:g} already; give more, or pause the sweep")


def _add(config: "SweepConfig", study: "SweepStudy", text: str) -> None:
    """Enqueue the point that ``text`` writes as YAML. Raises UserError for one that the space does not have."""
    from tune.purse import counted_trials
    from tune.space import Space

    if config.function:
        raise UserError("a function makes the points of this sweep: none can be added")
    try:
        point: Any = read_value(text)
    except ValueError:
        point = None
    if not isinstance(point, dict):
        raise UserError(f"--add '{text}' is no point: write for example '{{learning_rate: 0.001, adapter.rank: 8}}'")
    space = Space(config.config, config.space, config.constraints)
    if reason := space.outside(point) or space.why_not(point):
        raise UserError(f"--add: {reason}")
    study.enqueue(space.encode(point))
    budget = {**json.loads(config.budget.model_dump_json()), **study.note("budget", {})}
    if budget["trials"] is not None:
        study.write_note("budget", {**study.note("budget", {}), "trials": max(budget["trials"], counted_trials(study))})


def _typed(command: str, folder: Path) -> str:
    return f"workbench tune {command} {run_id(folder)}"


def add_to(app: typer.Typer) -> None:
    """Join the group ``tune``."""
    for command in (resume, pause, stop, extend, report, dashboard):
        app.command(command.__name__)(command)
