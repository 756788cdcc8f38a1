"""The demo's one page: each stage's summary and figures, and links to the run folders."""

import os
from pathlib import Path
from typing import Any

from cluster.stages import Stage
from workbench.files import read_json
from workbench.runs import Run, Summary, run_id


def headline(folder: Path, count: int = 4) -> str:
    """The first figures of a run's summary in one line."""
    scalars = {key: value for key, value in read_json(folder / "summary.json").items() if _is_figure(key, value)}
    return ", ".join(f"{key} {_short(value)}" for key, value in list(scalars.items())[:count])


def write_report(run: Run, plan: list[Stage], results: dict[str, Path], commands: dict[str, str]) -> Summary:
    """Fill the run's report from the stages' reports; the demo's summary: the figures a person asks for first."""
    report = run.report
    report.title = "workbench demo"
    for number, stage in enumerate(plan, 1):
        report.heading(f"{number}. {stage.title}", note=f"Skipped: {stage.skip}" if stage.skip else "")
        if not stage.skip:
            for step in stage.steps:
                _add_step(run, step.key, results[step.key], commands[step.key], step.tables)
    report.heading(f"{len(plan) + 1}. Profile", note="The whole demo on one time axis, a band per stage.")
    _add_step(run, "timeline", results["timeline"], commands.get("timeline", ""), ("Findings", "Phases", "By step"))
    return _summary(results)


def _add_step(run: Run, key: str, folder: Path, command: str, tables: tuple[str, ...]) -> None:
    summary = read_json(folder / "summary.json")
    lists = {name: value for name, value in summary.items() if isinstance(value, list) and value}
    scalars = {name: value for name, value in summary.items() if name not in lists}
    run.report.table(key, [{"figure": name, "value": value} for name, value in scalars.items()], note=command)
    for name, rows in lists.items():
        if isinstance(rows[0], dict):
            run.report.table(name, rows)
    run.report.include(folder / "report.json", tables)
    relative = os.path.relpath(folder, run.folder)
    run.report.links("", {f"report of {run_id(folder)}": f"{relative}/report.html", "run folder": f"{relative}/"})


def _summary(results: dict[str, Path]) -> Summary:
    wanted = {
        "audit": ["documents", "kept"],
        "embed": ["rows"],
        "eval": ["accuracy_base", "accuracy_tuned", "accuracy_majority"],
        "loadtest": ["base_best_tokens_per_s", "tuned_best_tokens_per_s", "tuned_x1_ttft_p50_ms"],
    }
    summary: dict[str, Any] = {}
    for key, names in wanted.items():
        figures = read_json(results[key] / "summary.json") if key in results else {}
        summary |= {f"{key}_{name}": figures[name] for name in names if name in figures}
    return summary


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and key != "seconds"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
