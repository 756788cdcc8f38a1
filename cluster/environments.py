"""A host's locked environment: this project's ``install.sh`` on the host, in a folder named by what was locked.

    environment_folder(host)      # ~/.workbench/env/3f2a9c01b4d7/.venv

A changed lock gives another folder, so an environment never changes under a running job; ``cluster up`` starts Ray from
the new one and then removes the old.
"""

import hashlib
import io
import subprocess
import tarfile
from functools import cache
from pathlib import Path

from cluster.inventory import Host
from cluster.ssh import Remote
from cluster.start_script import shell_path
from workbench.config import CHECKOUT
from workbench.errors import Failure

LOCK = ("pyproject.toml", "constraints.txt", "constraints-cuda.txt", "install.sh")
INSTALL_SECONDS = 3600
DONE = ".venv/complete"


def environment_folder(host: Host) -> str:
    """The virtual environment of ``host``: the one that its inventory names, or the one of this checkout's lock."""
    return host.environment or f"{_folder(host)}/.venv"


def is_ours(host: Host) -> bool:
    """Whether ``cluster up`` makes the environment of ``host``."""
    return not host.environment


def present(host: Host) -> str:
    """A shell expression that prints ``yes`` if the environment of ``host`` is there, whole."""
    mark = f"{_folder(host)}/{DONE}" if is_ours(host) else f"{host.environment}/bin/python"
    return f"if [ -e {shell_path(mark)} ]; then echo yes; else echo no; fi"


def install(remote: Remote) -> None:
    """Send this checkout to the host and run ``install.sh`` there; minutes, about 5 GB.

    Raises Failure with the end of what the installer said.
    """
    host = remote.host
    folder = shell_path(_folder(host))
    remote.send(f"mkdir -p {folder} && tar -xzf - -C {folder}", checkout_tar())
    remote.run("sh -s", stdin=f"{{\n{install_commands(host)}\n}} </dev/null\n", timeout=INSTALL_SECONDS)


def install_commands(host: Host) -> str:
    """Shell lines that make the environment from the checkout that was sent, and mark it as whole."""
    python = shell_path(host.python) if host.python[0] in "/~" else host.python
    return (
        f"cd {shell_path(_folder(host))} || exit 1\n"
        f"PYTHON={python} EXTRA={extra(host)} ./install.sh >install.out 2>&1 "
        "|| { tail -n 15 install.out >&2; exit 1; }\n"
        f"touch {DONE}"
    )


def remove_others(host: Host) -> str:
    """Shell lines that remove the environments that ``cluster up`` made of earlier locks."""
    keep = Path(_folder(host)).name
    return (
        f"for old in {shell_path(host.folder)}/env/*; do\n"
        f'    [ ! -d "$old" ] || [ "${{old##*/}}" = {keep} ] || rm -rf "$old"\ndone'
    )


def extra(host: Host) -> str:
    """The extra of the project that fits ``host``: vLLM for its cards, for its CPU, or none on a Mac."""
    if host.os == "macos":
        return "none"
    return "cuda" if host.cards else "cpu"


def lock_hash(host: Host) -> str:
    """What decides whether an environment of ``host`` is up to date: lock, interpreter and extra."""
    return hashlib.sha256(f"{_lock_text()} {host.python} {extra(host)}".encode()).hexdigest()[:12]


def checkout_tar() -> bytes:
    """The tracked files of this checkout as ``.tar.gz``, as they are on disk. Raises Failure outside a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise Failure(f"{CHECKOUT} is no git checkout, so what to install is not known: {listed.stderr.strip()}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in sorted(filter(None, listed.stdout.split("\0"))):
            if (CHECKOUT / name).is_file():
                tar.add(CHECKOUT / name, arcname=name)
    return packed.getvalue()


def _folder(host: Host) -> str:
    return f"{host.folder}/env/{lock_hash(host)}"


@cache
def _lock_text() -> str:
    return "\n".join((CHECKOUT / name).read_text() for name in LOCK)
