"""Run a command on a host over ssh, and put a file there.

    remote = Remote(host)
    print(remote.run("uname -a").stdout)

The user's own OpenSSH does it: keys, agents, jump hosts and ``~/.ssh/config`` work as they do by hand. Nothing asks:
a host that would ask for a password or an unknown key fails with what to type.
"""

import shlex
import subprocess
from dataclasses import dataclass, field

from cluster.inventory import Host
from workbench.config import ssh_options
from workbench.errors import Failure

CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Remote:
    """A host as ssh reaches it; ``options`` are further arguments of ssh, ``$WORKBENCH_SSH_OPTIONS`` if not given."""

    host: Host
    options: list[str] = field(default_factory=ssh_options)

    def command(self, script: str) -> list[str]:
        """The ssh command line that runs ``script`` in the remote login shell."""
        return [*self.ssh(), self.name(), script]

    def ssh(self) -> list[str]:
        """The ssh command line up to its destination; what speaks through ssh (rsync, a tunnel) begins with it."""
        return [
            "ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ServerAliveInterval=5",
            "-p", str(self.host.ssh_port), *self.options,
        ]  # fmt: skip

    def run(
        self, script: str, *, stdin: str = "", timeout: float = 60, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``script`` in the remote shell; secrets go through ``stdin``, never the command line.

        Raises Failure if the host cannot be reached, and, with ``check``, if the script fails.
        """
        return self._run(script, stdin.encode(), timeout, check)

    def send(self, script: str, data: bytes, *, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        """Run ``script`` with ``data`` as its input. Raises Failure as ``run`` does."""
        return self._run(script, data, timeout, True)

    def _run(self, script: str, data: bytes, timeout: float, check: bool) -> "subprocess.CompletedProcess[str]":
        try:
            raw = subprocess.run(self.command(script), input=data, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name()} did not answer within {timeout:g} s") from None
        except FileNotFoundError:
            raise Failure("no ssh client on this machine: install OpenSSH") from None
        done = subprocess.CompletedProcess(
            raw.args, raw.returncode, raw.stdout.decode(errors="replace"), raw.stderr.decode(errors="replace")
        )
        if done.returncode == 255:
            said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise Failure(f"cannot reach {self.name()}: {said[0]}; try: {shlex.join(self.command('true')[:-1])}")
        if check and done.returncode:
            raise Failure(f"on {self.name()}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
        return done

    def put(self, path: str, content: str, mode: int = 0o600) -> None:
        """Write ``content`` to ``path`` (``~/`` allowed) with ``mode``: a temporary file, then a rename."""
        quoted = remote_path(path)
        self.run(
            f'umask 077; p={quoted}; mkdir -p "$(dirname "$p")" && cat > "$p.new" && chmod {mode:o} "$p.new" '
            '&& mv "$p.new" "$p"',
            stdin=content,
        )

    def name(self) -> str:
        """``user@address``."""
        return f"{self.host.user}@{self.host.address}"


def remote_path(path: str) -> str:
    """``path`` quoted for a remote shell, with a leading ``~/`` left for it to expand."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)
