"""``workbench serve trace``: torch.profiler on every worker of an engine, for some seconds in which it serves.

    workbench serve trace model=tiny seconds=5

The engine goes on answering, more slowly, and is neither restarted nor changed. What it wrote opens in
https://ui.perfetto.dev; the report is that of ``workbench profile trace``.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from profiling.trace_events import read_traces
from profiling.trace_report import add_traces
from serve.application import APPLICATION, Deployed, deployed
from serve.engine import traces_folder
from workbench.config import Config
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary
from workbench.session import attach

START_SECONDS = 60.0
WRITE_SECONDS = 600.0
"""A second of a large engine is a hundred MB, which each worker writes when it is told to stop."""


class TraceConfig(Config):
    """Which engine, and for how long."""

    model: str = Field(description="a model that 'serve up' deployed")
    seconds: float = Field(5.0, gt=0, le=60, description="how long to trace; a trace is some MB a second")


def run(config: TraceConfig, run: Run) -> Summary:
    """Trace and summarise. Raises UserError for a model that is not served, Failure where its engine wrote nothing."""
    with attach() as attached:
        handle = _handle(config.model, deployed() if attached else None)
        folder = traces_folder(config.model)
        before = set(_traces(folder))
        run.say(f"tracing {config.model} for {config.seconds:g} s")
        _trace(handle, config.seconds)
    made = sorted(set(_traces(folder)) - before)
    if not made:
        raise Failure(f"{config.model} wrote no trace to {folder}: is that on storage that all hosts share?")
    for file in made:
        shutil.move(file, run.artifact("trace", file.name))
    return add_traces(run, read_traces(run.folder))


def _trace(handle: Any, seconds: float) -> None:
    """Have all replicas trace meanwhile; they stop too where we are interrupted. Raises Failure where one fails."""
    from ray.exceptions import RayError

    try:
        try:
            handle.broadcast("start_profile").results(timeout_s=START_SECONDS)
            time.sleep(seconds)
        finally:
            handle.broadcast("stop_profile").results(timeout_s=WRITE_SECONDS)
    except (RayError, TimeoutError) as error:
        raise Failure(f"the engine could not be traced: {error}; 'workbench serve logs' has more") from None


def _traces(folder: Path) -> list[Path]:
    return list(folder.rglob("*.pt.trace.json*"))


def _handle(model: str, application: Deployed | None) -> Any:
    from ray import serve

    roles = application.roles() if application else {}
    if model not in roles:
        raise UserError(f"model '{model}' is not served; {', '.join(sorted(roles)) or 'nothing'} is")
    return serve.get_deployment_handle(f"{roles[model]}:{model}", APPLICATION)
