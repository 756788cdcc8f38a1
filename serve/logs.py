"""Print what the engines wrote: ``workbench serve logs``, or of one model, ``workbench serve logs assistant``."""

import difflib

from pydantic import Field

from serve.application import deployed, engine_log
from workbench.config import Config
from workbench.errors import UserError
from workbench.redact import redact
from workbench.runs import Run, Summary
from workbench.session import attach


class LogsConfig(Config):
    """Whose log, and how much of it."""

    model: str = Field(default="", description="A model's name; default: all")
    lines: int = Field(default=100, ge=1, description="Last lines of each process")


def run(config: LogsConfig, run: Run) -> Summary:
    """Print the last lines of each model's replicas and engine processes. Raises UserError for a model that is not
    served."""
    with attach() as attached:
        application = deployed() if attached else None
        if application is None:
            raise UserError("nothing is served by this checkout on this cluster")
        models = application.models()
        if config.model and config.model not in models:
            near = difflib.get_close_matches(config.model, models, 1)
            raise UserError(
                f"no model '{config.model}' is served; " + (f"did you mean {near[0]}?" if near else ", ".join(models))
            )
        told = {
            name: engine_log(application.workers_of(name), config.lines)
            for name in ([config.model] if config.model else models)
        }
    for name, text in told.items():
        print(f"== {name} ==\n{redact(text)}", end="")
    return {"models": ", ".join(told), "lines": sum(text.count("\n") for text in told.values())}
