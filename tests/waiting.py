"""A command for tests of interruption: says that it runs, then waits until it is stopped."""

import sys
import threading
from typing import Any

from workbench.commands import Command, execute
from workbench.config import Config
from workbench.runs import Run


class WaitConfig(Config):
    """Whether to fail instead of waiting."""

    fail: str = ""


def run(config: WaitConfig, run: Run) -> dict[str, Any]:
    """Wait, or raise what ``fail`` says."""
    if config.fail:
        raise RuntimeError(config.fail)
    run.metrics(1, loss=0.5)
    run.say("waiting")
    threading.Event().wait()
    return {}


if __name__ == "__main__":
    from workbench import cli

    cli.app.registered_commands.clear()
    cli.app.registered_groups.clear()

    @cli.app.command()
    def wait(ray: bool = False, fail: str = "") -> None:
        """Run the waiting command."""
        command = Command("waiting", "", ray=ray)
        execute("test", "wait", command, [f"fail={fail}"], run_name="", as_json=True)

    cli.main(sys.argv[1:])
