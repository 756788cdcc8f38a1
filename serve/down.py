"""Take down what ``serve up`` deployed; other Serve applications of the cluster are left alone."""

from serve.application import remove
from workbench.config import Config
from workbench.runs import Run, Summary


class DownConfig(Config):
    """Nothing to configure."""


def run(config: DownConfig, run: Run) -> Summary:
    """Delete our application, and Serve itself where nothing else uses it."""
    removed = remove()
    run.say("taken down" if removed else "nothing was up")
    return {"removed": removed}
