"""Take down what ``serve up`` deployed; other Serve applications of the cluster are left alone."""

from serve.application import remove
from workbench.config import Config
from workbench.runs import Run, Summary
from workbench.session import attach


class DownConfig(Config):
    """Nothing to configure."""


def run(config: DownConfig, run: Run) -> Summary:
    """Delete our application, and Serve itself where nothing else uses it."""
    with attach() as attached:
        removed = attached and remove()
    run.say("taken down" if removed else "nothing was up")
    return {"removed": removed}
