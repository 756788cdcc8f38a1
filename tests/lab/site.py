"""A cluster in the lab as its user sees it: an inventory on the laptop, and the workbench's commands there.

with Lab.start(HOSTS) as lab:
    site = Site(lab)
    site.discover()
    site.workbench("cluster up --yes")
"""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000, Card
from lab.host import USER
from lab.lab import ROOT, Lab

HEAD, BOX, SPARE = "system-a", "linux-box", "spare"
HOSTS: dict[str, list[Card]] = {HEAD: [RTX_5090, RTX_PRO_6000], BOX: [RTX_5060_TI], SPARE: []}
"""The Linux hosts of the three machines, and one without cards."""

INVENTORY = f"/home/{USER}/cluster.yaml"
STATE = f"/home/{USER}/state"


@dataclass
class Site:
    """The laptop's view of ``lab``."""

    lab: Lab
    cpus: int = 2

    def __post_init__(self) -> None:
        self.lab.laptop.environment |= {
            "WORKBENCH_STATE": STATE,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }

    @property
    def members(self) -> list[str]:
        """The names of the cluster's hosts, the head first."""
        return [name for name in self.lab.hosts if name != self.lab.laptop.name]

    def workbench(self, line: str, *, check: bool = True, timeout: float = 240) -> "subprocess.CompletedProcess[str]":
        """Run ``workbench LINE`` on the laptop."""
        return self.lab.laptop.run(f"workbench {line}", check=check, timeout=timeout)

    def discover(self) -> None:
        """Write the inventory from what the hosts report, and let them share two cores."""
        targets = " ".join(f"{USER}@{self.lab[name].address}" for name in self.members)
        self.workbench(f"cluster init --discover {targets} {INVENTORY} --force --storage /srv/storage")
        inventory = self.inventory()
        for name, host in inventory["hosts"].items():
            host |= {"environment": f"{ROOT}/.venv", "cpus": self.cpus, "object_store_gb": 0.1}
            host["labels"] = {"rack": f"of-{name}"}
        self.write(inventory)

    def inventory(self) -> dict[str, Any]:
        """The inventory as the laptop has it."""
        found: dict[str, Any] = yaml.safe_load(self.lab.laptop.path(INVENTORY).read_text())
        return found

    def write(self, inventory: dict[str, Any]) -> None:
        """Replace the laptop's inventory."""
        self.lab.laptop.write(INVENTORY, yaml.safe_dump(inventory, sort_keys=False), root=False)

    def status(self) -> dict[str, Any]:
        """What ``cluster status --json`` says."""
        found: dict[str, Any] = json.loads(self.workbench("cluster status --json", check=False).stdout)
        return found

    def in_cluster(self) -> set[str]:
        """The hosts that the head holds for alive; empty if it does not answer."""
        return {name for name, host in self.status()["hosts"].items() if host["in_cluster"]}

    def rays(self, name: str) -> set[int]:
        """Process ids of the raylets on host ``name``."""
        return {pid for pid, line in self.lab[name].processes("/raylet/raylet ").items() if "--raylet_socket" in line}

    def python(self, name: str, code: str, *, timeout: float = 180, check: bool = True, **variables: str) -> str:
        """Run ``code`` as a plain driver on a member, with the variables that ``up`` gave its Ray; what it printed."""
        variables = {"RAY_ADDRESS": f"{self.lab[self.members[0]].address}:6379", "PYTHONPATH": str(ROOT), **variables}
        exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
        script = f"set -a; . ~/.workbench/ray.env; set +a; {exports} exec {ROOT}/.venv/bin/python -"
        return self.lab[name].run(script, stdin=code, timeout=timeout, check=check).stdout

    @contextmanager
    def dashboard(self) -> Iterator[None]:
        """Keep ``cluster dashboard`` open on the laptop for the block."""
        log = self.lab.folder / "dashboard.log"
        process = self.lab.laptop.start("exec workbench cluster dashboard", log)
        try:
            until(lambda: "http://" in log.read_text(), 60, "the tunnel to the dashboard")
            yield
        finally:
            self.lab.laptop.kill("cluster dashboard", 15)
            process.wait(20)

    def share(self, *names: str) -> None:
        """Copy files of this folder to the shared storage."""
        for name in names:
            shutil.copy(ROOT / "tests" / "lab" / name, self.lab.storage / name)


def until(holds: Callable[[], bool], seconds: float, what: str, pause: float = 0.5) -> float:
    """Wait until ``holds``; how many seconds it took."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
    return time.monotonic() - began
