"""One host of the lab: namespaces of its own with Debian's sshd and runit in them.

host.run("ray status")                  # as the host's user
host.run("umount /srv/storage", root=True)
host.kill("raylet")
host.shift_clock(90)
"""

import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

USER, UID = "ada", 1000
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@dataclass
class Host:
    """A host that runs; ``pid`` is its PID 1 as the machine numbers it."""

    name: str
    address: str
    pid: int
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, script: str, *, root: bool = False, timeout: float | None = None) -> list[str]:
        """The command line, on the machine, that runs ``script`` in this host.

        With ``timeout`` the host itself ends the script after that many seconds: killing ``nsenter`` would not.
        """
        user = "root" if root else USER
        home = "/root" if root else f"/home/{USER}"
        identity = [] if root else ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        variables = {"HOME": home, "USER": user, "LOGNAME": user, "PATH": PATH, "LANG": "C.UTF-8", **self.environment}
        limit = [] if timeout is None else ["timeout", "--kill-after=5", f"{timeout:g}"]
        return [
            "nsenter", f"--target={self.pid}", *NAMESPACES, f"--root=/proc/{self.pid}/root", "--",
            *identity, "env", "-i", f"--chdir={home}", *(f"{name}={value}" for name, value in variables.items()),
            *limit, "bash", "-c", script,
        ]  # fmt: skip

    def run(
        self, script: str, *, root: bool = False, check: bool = True, timeout: float = 60, stdin: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``script`` to its end. Raises AssertionError with its output if it fails and ``check`` is set."""
        done = subprocess.run(
            self.command(script, root=root, timeout=timeout), input=stdin, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            raise AssertionError(f"{self.name}: exit {done.returncode} from: {script}\n{said}")
        return done

    def start(self, script: str, log: Path, *, root: bool = False) -> "subprocess.Popen[bytes]":
        """Start ``script`` with its output in ``log``, a file of the machine."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(script, root=root), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def path(self, inside: str) -> Path:
        """The host's file ``inside`` as the machine reaches it."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def processes(self, words: str) -> dict[int, str]:
        """Command lines that contain ``words``, by the process id on the machine."""
        ours = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if (entry / "ns/pid").readlink() != ours:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has ended
                continue
            if words in line:
                found[int(entry.name)] = line
        return found

    def kill(self, words: str, signum: int = signal.SIGKILL) -> list[int]:
        """Signal every process of this host whose command line contains ``words``; its process ids."""
        killed = []
        for pid in self.processes(words):
            if pid != self.pid:
                os.kill(pid, signum)
                killed.append(pid)
        return killed

    def write(self, inside: str, content: str, mode: int = 0o644, *, root: bool = True) -> None:
        """Replace the file ``inside`` by ``content`` in one step."""
        quoted = shlex.quote(inside)
        self.run(
            f"mkdir -p $(dirname {quoted}) && cat > {quoted}.new && chmod {mode:o} {quoted}.new "
            f"&& mv {quoted}.new {quoted}",
            root=root,
            stdin=content,
        )

    def shift_clock(self, seconds: float) -> None:
        """Let commands that come over ssh read a clock that is ``seconds`` ahead; 0 sets it right."""
        shifted = f" LD_PRELOAD={FAKETIME} FAKETIME={seconds:+g} FAKETIME_DONT_RESET=1" if seconds else ""
        self.run(
            f"sed -i 's|^SetEnv .*|SetEnv PATH={PATH}{shifted}|' /etc/ssh/sshd_config && sv restart /etc/service/sshd",
            root=True,
        )
        self.await_port(22)

    def await_port(self, port: int, seconds: float = 20) -> None:
        """Wait until something in this host listens on ``port``."""
        deadline = time.monotonic() + seconds
        while not self.run(f"ss -Hltn 'sport = :{port}'", root=True).stdout.strip():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: nothing listens on port {port} after {seconds:g} s")
            time.sleep(0.1)
