"""``tune dashboard``: optuna-dashboard on a sweep's study, TensorBoard on its trials, and where Ray's dashboard is.

    workbench tune dashboard tune-run/20261121T120000

All on loopback, and read-only: a page that another site opened in the same browser, or another user of the machine,
can change nothing, and the study cannot be deleted by a click.
"""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tune.study import FILE

HOST = "127.0.0.1"

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A page asks every few seconds: none of it is told."""


def study_page(folder: Path, port: int) -> WSGIServer:
    """A server of optuna-dashboard for the study in ``folder``, at ``port`` of loopback (0: any), not yet serving.

    Raises OSError where the port is taken.
    """
    import optuna_dashboard

    app = optuna_dashboard.wsgi(str(folder / FILE))
    return make_server(HOST, port, read_only(app), server_class=_Server, handler_class=_Quiet)


def read_only(app: App) -> App:
    """``app`` without what changes anything, and only under loopback's own names (DNS rebinding)."""

    def guarded(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        name = environment.get("HTTP_HOST", "").rpartition(":")[0]
        if environment["REQUEST_METHOD"] not in ("GET", "HEAD") or name not in (HOST, "localhost"):
            start("403 Forbidden", [("Content-Type", "application/json")])
            return [b'{"reason": "this page only shows; orders are given by workbench tune pause, stop and extend"}']
        return app(environment, start)

    return guarded


def tensorboard(folder: Path, port: int) -> str:
    """Start TensorBoard on the trials below ``folder`` in a thread; its URL. ``port`` 0 is any."""
    from tensorboard import default, program

    board = program.TensorBoard(plugins=default.get_plugins())
    trials = str(folder / "artifacts" / "trials")
    # Its fast loader is a process of its own, which tells of itself.
    board.configure(argv=["", "--logdir", trials, "--host", HOST, "--port", str(port), "--load_fast", "false"])
    return str(board.launch())


def serve(folder: Path, port: int, ray: str, say: Callable[[str], Any]) -> None:
    """Serve the pages until interrupted; ``say`` hears where they are, and where that of the sweep's Ray is: ``ray``.

    Raises OSError where ``port`` is taken.
    """
    with study_page(folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        say(f"study        http://{HOST}:{server.server_port}/dashboard")
        say(f"TensorBoard  {tensorboard(folder, 0)}")
        say(f"Ray          {ray or 'has ended with the sweep'}")
        thread.join()
