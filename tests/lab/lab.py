"""Several hosts on one Linux machine: namespaces on a bridge, each with sshd, runit and cards that a file describes.

    with Lab.start({"system-a": SYSTEM_A, "box": BOX}) as lab:
        lab.laptop.run("ssh system-a hostname")
        lab.cut("box")

Needs root, ``ip``, ``nft`` and Debian's openssh-server, runit and gcc. Nothing in it reaches the machine's own network.
A lab ends with the process that started it; what a killed one left is removed when the next one starts.
"""

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from lab.cards import Card, library, write_cards
from lab.files import LAPTOP, make_keys, write_etc, write_home
from lab.host import PATH, Host
from lab.network import SUBNET, Network

ROOT = Path(__file__).resolve().parents[2]
STATE = Path("/tmp/workbench-lab")
TOOLS = {
    "ip": "iproute2", "nft": "nftables", "sshd": "openssh-server", "ssh-keygen": "openssh-client",
    "runsvdir": "runit", "gcc": "gcc", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
PR_SET_PDEATHSIG = 1
NUMBERS = itertools.count()


def missing() -> str:
    """What keeps a lab from starting here, or nothing."""
    if not sys.platform.startswith("linux"):
        return "the lab needs Linux"
    if os.geteuid() != 0:
        return "the lab needs root"
    if " " in f"{ROOT}":
        return f"the lab's hosts share this checkout, and Ray needs a path without spaces: {ROOT}"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None})
    if lacking:
        return f"the lab needs: apt-get install {' '.join(lacking)}"
    probe = "mount -t tmpfs none /run && ip link add name probe0 type bridge && nft add table bridge probe"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "sh", "-c", probe],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"the lab needs the right to make namespaces: {done.stderr.strip()}" if done.returncode else ""


class Lab:
    """A running lab. ``hosts`` are the machines by name, the laptop among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, Host] = {}
        self._running: list[subprocess.Popen[bytes]] = []

    @classmethod
    def start(cls, hosts: Mapping[str, list[Card]], *, stay: bool = False) -> "Lab":
        """Start ``hosts`` with their cards, and a laptop. With ``stay`` the lab outlives this process."""
        remove_stale()
        lab = cls(STATE / f"{os.getpid()}-{next(NUMBERS)}")  # tests may have one for all and one of their own
        try:
            lab._start(hosts, stay)
        except BaseException:
            lab.stop()
            raise
        return lab

    @classmethod
    def attach(cls) -> "Lab":
        """The lab that was started to stay. Raises LookupError if there is none."""
        for folder in sorted(STATE.iterdir()) if STATE.exists() else ():
            record = folder / "hosts.json"
            if record.exists() and _alive(folder):
                lab, known = cls(folder), json.loads(record.read_text())
                lab.network = Network(known["network"])
                lab.hosts = {name: Host(**fields) for name, fields in known["hosts"].items()}
                return lab
        raise LookupError("no lab is up: python -m lab up")

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def laptop(self) -> Host:
        """The machine that is not a member of the cluster."""
        return self.hosts[LAPTOP]

    @property
    def storage(self) -> Path:
        """What every host has at /srv/storage, as the machine reaches it."""
        return self.folder / "storage"

    def cut(self, name: str) -> None:
        """Cut the link of host ``name`` in silence."""
        self.network.cut(name)

    def mend(self, name: str) -> None:
        """Mend the link of host ``name``."""
        self.network.mend(name)

    def stop(self) -> None:
        """End every process of the lab and remove its files."""
        for process in self._running:
            process.kill()
            process.wait()
        _remove(self.folder)

    def _start(self, hosts: Mapping[str, list[Card]], stay: bool) -> None:
        self.storage.mkdir(parents=True)
        self.storage.chmod(0o1777)
        keys = make_keys(self.folder / "keys", [*hosts, LAPTOP])
        self.network = Network(self._process("network", ["sleep", "infinity"], ["--net"], stay))
        owner = self._running[0].pid if stay else os.getpid()
        (self.folder / "owner").write_text(json.dumps({"pid": owner, "started": _started(owner)}))
        self.network.create()
        addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate([*hosts, LAPTOP], start=11)}
        for name in addresses:
            folder = self.folder / name
            write_etc(folder / "etc", name, addresses, keys)
            write_home(folder / "home", name, addresses, keys)
            if hosts.get(name):
                shutil.copytree(library(self.folder).parent, folder / "nvidia")
                write_cards(folder / "etc" / "nvidia-cards", hosts[name])
            (folder / "storage").symlink_to(self.storage)
            self.hosts[name] = Host(name, addresses[name], 0, {"PATH": f"{ROOT}/.venv/bin:{PATH}"})
            boot = [str(Path(__file__).with_name("boot.sh")), str(folder), name, *_visible()]
            self.hosts[name].pid = self._process(name, boot, ["--mount", "--uts", "--ipc", "--net", "--pid"], stay)
        for host in self.hosts.values():
            self.network.plug(host.name, host.pid, host.address)
            self._await_boot(host)
        for host in self.hosts.values():
            host.await_port(22)
        known = {"network": self.network.pid, "hosts": {name: asdict(host) for name, host in self.hosts.items()}}
        (self.folder / "hosts.json").write_text(json.dumps(known))

    def _process(self, name: str, command: list[str], namespaces: list[str], stay: bool) -> int:
        """Start ``command`` in new ``namespaces``; the process id of its PID 1."""
        libc = ctypes.CDLL(None)
        with (self.folder / f"{name}.log").open("wb") as log:
            running = subprocess.Popen(
                ["unshare", "--fork", "--kill-child", *namespaces, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if stay else lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        self._running.append(running)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()):
            if running.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.01)
        pid = int(found[0])
        with (self.folder / "processes").open("a") as record:
            for one in (running.pid, pid):
                record.write(json.dumps({"pid": one, "started": _started(one)}) + "\n")
        return pid

    def _await_boot(self, host: Host, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not host.path("/run/booted").exists():
            if time.monotonic() > deadline or not Path(f"/proc/{host.pid}").exists():
                raise RuntimeError(f"{host.name} did not boot: {(self.folder / f'{host.name}.log').read_text()}")
            time.sleep(0.02)


def remove_stale() -> None:
    """End what killed labs left running, known by process id and start time, and remove their files."""
    for folder in STATE.iterdir() if STATE.exists() else ():
        if not _alive(folder):
            _remove(folder)


def _alive(folder: Path) -> bool:
    """Whether the process that the lab belongs to lives: who started it or, if it is to stay, its network's."""
    try:
        owner = json.loads((folder / "owner").read_text())
    except FileNotFoundError:
        return Path(f"/proc/{folder.name.partition('-')[0]}").exists()
    return _started(owner["pid"]) == owner["started"]


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "processes").read_text().splitlines():
            process = json.loads(line)
            if _started(process["pid"]) == process["started"]:
                os.kill(process["pid"], signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        STATE.rmdir()


def _started(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _visible() -> list[str]:
    """Folders that every host sees at their own path: the checkout, and the interpreter of its environment."""
    base = Path(sys.base_prefix).resolve()
    return [str(ROOT)] if base.is_relative_to("/usr") else [str(ROOT), str(base)]
