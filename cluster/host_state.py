"""What a host has now of what ``cluster up`` gives it: one shell script over ssh, read-only.

state = look(inventory, "system-a", host_files(inventory, "system-a"))
state.supervisor       # active, starting, stopped, failed or absent
"""

import shlex
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from cluster import environments, firewall
from cluster.inventory import Inventory
from cluster.render import HostFile
from cluster.ssh import Remote
from cluster.start_script import shell_path
from cluster.supervisors import supervisor
from workbench.errors import Failure

T = TypeVar("T")

TOOLS = """
sum() { { sha256sum 2>/dev/null || shasum -a 256; } <"$1" | cut -c1-64; }
mode() { stat -c %a "$1" 2>/dev/null || stat -f %Lp "$1"; }
show() { if [ -f "$2" ]; then echo "file $1 $(sum "$2") $(mode "$2")"; fi; }
"""

VERSIONS = (
    "import sys; from importlib.metadata import version as v; "
    "print('.'.join(map(str, sys.version_info[:3])), v('ray'), v('torch'))"
)


@dataclass(frozen=True)
class FileState:
    """SHA-256 and permissions of a file."""

    digest: str
    mode: int


@dataclass(frozen=True)
class HostState:
    """What was found on one host. ``running`` is what its Ray was started from: revision and token's fingerprint."""

    supervisor: str = "absent"
    files: dict[str, FileState] = field(default_factory=dict)
    cluster: str = ""
    running: tuple[str, str] = ("", "")
    environment: bool = False
    firewall: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def look(inventory: Inventory, name: str, files: list[HostFile], *, details: bool = False) -> HostState:
    """The state of host ``name``; with ``details`` also versions and the end of Ray's log.

    Raises Failure if the host cannot be reached.
    """
    host = inventory.hosts[name]
    folder = shell_path(host.folder)
    paths = [*(file.path for file in files), inventory.token_file]
    lines = [
        TOOLS,
        *(f"show {index} {shell_path(path)}" for index, path in enumerate(paths)),
        f"echo \"cluster $(sed -n 's/^WORKBENCH_CLUSTER=//p' {folder}/ray.env 2>/dev/null)\"",
        f'echo "running $(cat {folder}/running 2>/dev/null)"',
        f'echo "environment $({environments.present(host)})"',
        f'echo "supervisor $({supervisor(inventory, name).state}\n)"',
    ]
    if host.os == "linux":
        lines.append(f'echo "firewall $({firewall.in_force(inventory, name)})"')
    if details:
        python = f"{shell_path(environments.environment_folder(host))}/bin/python"
        lines.append(f'echo "versions $({python} -c {shlex.quote(VERSIONS)} 2>/dev/null)"')
        lines.append(f"tail -n 12 {folder}/ray.log 2>/dev/null | sed 's/^/log /'")
    said = run_script(Remote(host), "\n".join(lines)).stdout
    return parse(said, paths)


def parse(said: str, paths: list[str]) -> HostState:
    """The state that the script reported, a word and its values a line."""
    files: dict[str, FileState] = {}
    words: dict[str, str] = {}
    log: list[str] = []
    for line in said.splitlines():
        word, _, rest = line.partition(" ")
        if word == "file":
            index, digest, mode = rest.split()
            files[paths[int(index)]] = FileState(digest, int(mode, 8))
        elif word == "log":
            log.append(rest)
        else:
            words[word] = rest.strip()
    revision, _, token = words.get("running", "").partition(" ")
    versions = words.get("versions", "").split()
    return HostState(
        supervisor=words.get("supervisor", "absent"),
        files=files,
        cluster=words.get("cluster", ""),
        running=(revision, token),
        environment=words.get("environment") == "yes",
        firewall=words.get("firewall", ""),
        versions=dict(zip(("python", "ray", "torch"), versions, strict=False)),
        log=log,
    )


def run_script(remote: Remote, script: str, *, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run lines of POSIX sh on the host, whatever its login shell is. Raises Failure as ``Remote.run``."""
    return remote.run("sh -s", stdin="{\n" + script + "\n} </dev/null\n", timeout=timeout)


def on_each(names: Iterable[str], act: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Call ``act`` for every host at once: the results, and what went wrong on those where it failed."""
    names = list(names)
    results: dict[str, T] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
        futures = {name: pool.submit(act, name) for name in names}
        for name, future in futures.items():
            try:
                results[name] = future.result()
            except Failure as error:
                failures[name] = str(error)
    return results, failures
