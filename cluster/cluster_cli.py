"""``workbench cluster``: the machines. Here is ``local``, a head on loopback; the rest is in modules of its own."""

import signal
import sys
import threading
from typing import Annotated

import typer

from cluster import bring_up_cli, doctor_cli

cluster_app = typer.Typer(
    help="Machines: one cluster of several hosts, or of this one.", no_args_is_help=True, rich_markup_mode=None
)
cluster_app.command()(doctor_cli.init)
cluster_app.command()(doctor_cli.doctor)
bring_up_cli.register(cluster_app)


@cluster_app.command()
def local(cpus: Annotated[int | None, typer.Option(help="CPUs to offer; all of them if not given.")] = None) -> None:
    """Run a Ray head on loopback with token authentication until Ctrl-C; 'workbench submit' finds it."""
    from cluster.local_head import local_head

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with local_head(cpus) as cluster:
        print(f"head up: dashboard {cluster.dashboard}, token in {cluster.token_file}", file=sys.stderr)
        print(
            "try in another terminal: workbench submit -- data audit    (Ctrl-C here stops the head)", file=sys.stderr
        )
        try:
            stop.wait()
        except KeyboardInterrupt:
            print("stopping the head", file=sys.stderr)
