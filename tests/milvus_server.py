"""The packaged Milvus server in a network namespace of its own, for tests and benchmarks.

    with milvus_server(tmp_path / "milvus") as server:
        server.run([sys.executable, "-m", "workbench", "data", "embed", f"uri={server.uri}", ...])
        server.kill()
        server.start()

The server listens on every interface it sees. Its namespace has a loopback and nothing else, so only what ``run``,
``popen`` and ``python`` start in there can reach it, and two servers never meet. It ends with the process that started
it, also when that is killed. By hand, for the length of a command:

    .venv/bin/python tests/milvus_server.py FOLDER -- .venv/bin/workbench data bench uri=http://127.0.0.1:19530
"""

import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PORT, HEALTH_PORT = 19530, 9091
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ip": "iproute2"}
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
AS_ROOT = os.geteuid() == 0
START_SECONDS, STOP_SECONDS = 180, 3

AWAIT_HEALTH = """
import http.client, sys, time
deadline = time.monotonic() + float(sys.argv[2])
said = "nothing listens"
while time.monotonic() < deadline:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=5)
        connection.request("GET", "/healthz")
        said = connection.getresponse().read().decode(errors="replace")
        if said.strip() == "OK":
            sys.exit()
    except (OSError, http.client.HTTPException) as error:
        said = str(error)
    time.sleep(0.1)
sys.exit(f"not healthy: {said}")
"""


def missing() -> str:
    """What keeps the server from starting here, or nothing."""
    if not sys.platform.startswith("linux") or importlib.util.find_spec("milvus") is None:
        return "the packaged Milvus server (milvus==2.3.5, Linux on x86_64) is not installed"
    lacking = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None})
    if lacking:
        return f"the Milvus server needs: apt-get install {' '.join(lacking)}"
    done = subprocess.run(
        [*_unshare(), "ip", "link", "set", "lo", "up"], env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    return f"the Milvus server needs a network namespace: {done.stderr.strip()}" if done.returncode else ""


def _unshare() -> list[str]:
    return ["unshare", "--net", *([] if AS_ROOT else ["--user", "--map-root-user"]), "--"]


def binaries() -> Path:
    """The folder of the server's program and libraries, unpacked once for each environment (250 MB)."""
    import milvus

    packed = Path(milvus.__file__).parent / "data" / "bin"
    unpacked = Path(sys.prefix) / f"milvus-server-{milvus.__version__}"
    if not unpacked.is_dir():
        making = Path(tempfile.mkdtemp(dir=sys.prefix, prefix="milvus-server-"))
        for file in packed.glob("*.lzma"):
            with lzma.open(file) as source, (making / file.stem).open("wb") as target:
                shutil.copyfileobj(source, target)
            (making / file.stem).chmod(0o755)
        try:
            making.rename(unpacked)
        except OSError:  # another process was faster
            shutil.rmtree(making)
    return unpacked


class MilvusServer:
    """A server on the data of ``folder``. Use it through ``milvus_server``."""

    def __init__(self, folder: Path, settings: dict[str, str | int | bool]) -> None:
        import milvus

        self.folder = folder.resolve()
        self.uri = f"http://127.0.0.1:{PORT}"
        self._programs = binaries()
        config = milvus.MilvusServerConfig(data_dir=str(self.folder))
        config.resolve_storage()
        for number, (key, (_, value)) in enumerate(config.configurable_items.items()):
            if key.endswith("_port") and not value:
                config.set(key, 40_000 + number)
        config.set("proxy_port", PORT)
        for key, value in settings.items():
            config.set(key, value)
        config.write_config()
        self._process: subprocess.Popen[bytes] | None = None
        # Holds the namespace open between two lives of the server; its input ends with this process.
        self._namespace = subprocess.Popen(
            [*_unshare(), "sh", "-c", "ip link set lo up && echo up && exec cat >/dev/null"],
            env={**os.environ, "PATH": PATH}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._namespace.stdout is not None
        if self._namespace.stdout.readline() != b"up\n":
            raise RuntimeError("no network namespace could be made")

    @property
    def pid(self) -> int:
        """The process id of the running server, on this machine."""
        assert self._process is not None
        return self._process.pid

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The command line that runs ``command`` in the server's namespace; it keeps the process id."""
        user = [] if AS_ROOT else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self._namespace.pid}", *user, "--net", "--", *map(str, command)]

    def run(self, command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[str]":
        """``subprocess.run`` of ``command`` in the namespace, its output captured as text unless ``options`` differ."""
        return subprocess.run(self.inside(command), **{"capture_output": True, "text": True, **options})

    def popen(self, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[Any]":
        """``subprocess.Popen`` of ``command`` in the namespace."""
        return subprocess.Popen(self.inside(command), **options)

    def python(self, script: str, *arguments: str | int | float) -> Any:
        """Run a Python script in the namespace and give what it printed last, read as JSON; None if it said nothing."""
        done = self.run([sys.executable, "-c", script, *map(str, arguments)])
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr[-3000:]}")
        lines = done.stdout.splitlines()
        return json.loads(lines[-1]) if lines else None

    def start(self) -> None:
        """Start on the data that is there, and wait until the server says that it is healthy."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        environment = os.environ | {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(HEALTH_PORT),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
            "LD_LIBRARY_PATH": str(self._programs),
        }
        with (logs / "server.log").open("ab") as log:
            self._process = self.popen(
                ["setpriv", "--pdeathsig", "KILL", self._programs / "milvus", "run", "standalone"],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.python(AWAIT_HEALTH, HEALTH_PORT, START_SECONDS)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the server by SIGTERM; by SIGKILL after some seconds, as its package does: it was never seen to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def close(self) -> None:
        """Stop the server and give its namespace up."""
        self.stop()
        assert self._namespace.stdin is not None
        self._namespace.stdin.close()
        self._namespace.wait()


@contextmanager
def milvus_server(folder: Path, **settings: str | int | bool) -> Iterator[MilvusServer]:
    """A running server on ``folder``; ``settings`` are of the package's own template (``authorization_enabled``, ...).

    Raises RuntimeError, with the end of its log, if it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = MilvusServer(folder, settings)
    try:
        try:
            server.start()
        except RuntimeError as error:
            log = (server.folder / "logs" / "server.log").read_text(errors="replace")
            raise RuntimeError(f"the Milvus server did not start: {error}\n{log[-3000:]}") from None
        yield server
    finally:
        server.close()


def main(arguments: list[str]) -> int:
    """Run a command beside a server: FOLDER -- COMMAND."""
    if len(arguments) < 3 or arguments[1] != "--":
        print(f"usage: {Path(__file__).name} FOLDER -- COMMAND ARGUMENT...", file=sys.stderr)
        return 2
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    with milvus_server(Path(arguments[0])) as server:
        return server.run(arguments[2:], capture_output=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
