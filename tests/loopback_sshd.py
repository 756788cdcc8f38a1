"""A real sshd on loopback, with keys and a home directory of the test's own, as a host that is reached over ssh.

with loopback_sshd(folder, "127.0.0.2") as sshd:
    monkeypatch.setenv("WORKBENCH_SSH_OPTIONS", sshd.options)     # port sshd.port, home sshd.home
"""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")

CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
UseDNS no
PidFile none
SetEnv HOME={home} PATH={path}
"""


@dataclass(frozen=True)
class Sshd:
    """A running sshd; ``options`` are what ssh needs to be let in, as ``WORKBENCH_SSH_OPTIONS`` takes them."""

    address: str
    port: int
    user: str
    home: Path
    options: str


@contextmanager
def loopback_sshd(folder: Path, address: str) -> Iterator[Sshd]:
    """Run it for the block; every login sees ``folder``/home as its home."""
    assert SSHD is not None
    home = folder / "home"
    home.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    config = folder / "sshd_config"
    config.write_text(CONFIG.format(address=address, port=port, folder=folder, home=home, path=path))
    with (folder / "sshd.log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    try:
        _wait_for(address, port)
        options = [
            "-F", "none", "-i", str(folder / "user_key"), "-o", "IdentitiesOnly=yes",
            "-o", "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={folder}/known_hosts",
            "-o", "LogLevel=ERROR",
        ]  # fmt: skip
        yield Sshd(address, port, getpass.getuser(), home, shlex.join(options))
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(address: str, port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
