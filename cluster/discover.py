"""An inventory from what hosts report of themselves over ssh.

inventory = discover(["ada@192.168.1.10", "ada@mac.local:2222"], storage="")
"""

import getpass
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from cluster.cards import card_model
from cluster.doctor_row import GIB, gib
from cluster.facts import CardFacts, Facts, read_facts
from cluster.inventory import Host, Inventory, inventory_of
from cluster.ssh import Remote
from workbench.config import ssh_options
from workbench.errors import UserError

TARGET = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?P<address>\[[^\]\s]+\]|[^:@\s]+)(?::(?P<port>\d+))?")
MEMORY_SIZES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 94, 96, 128, 141, 144, 180, 192, 288)
"""GB on the boxes of cards."""
STORAGE = "/srv/workbench"
"""What is written where nobody knows the shared storage."""


def discover(targets: list[str], storage: str = "") -> tuple[Inventory, dict[str, Facts]]:
    """The inventory of the hosts at ``targets``, ``[user@]host[:port]`` each, and what they said; the first Linux
    host is the head.

    ``storage``: what they share; empty for a network file system that all of them mount, or STORAGE.
    Raises UserError for a target that is none, Failure for a host that does not answer.
    """
    reached = [reachable(target) for target in targets]
    with ThreadPoolExecutor(len(reached)) as pool:
        found = list(pool.map(lambda host: read_facts(Remote(host), {}), reached))
    hosts: dict[str, Any] = {}
    for host, facts in zip(reached, found, strict=True):
        hosts[_name(facts, list(hosts))] = described(host, facts)
    linux = [name for name, host in hosts.items() if host["os"] == "linux"]
    if not linux:
        raise UserError(f"none of {', '.join(targets)} runs Linux: the head must, name one that does")
    shared = storage or _shared_mount(found) or STORAGE
    inventory = inventory_of({"head": linux[0], "storage": shared, "hosts": hosts})
    return inventory, dict(zip(hosts, found, strict=True))


def reachable(target: str) -> Host:
    """``[user@]host[:port]`` as an inventory has it; what is left out comes from the user's ssh configuration."""
    match = TARGET.fullmatch(target)
    if match is None:
        raise UserError(
            f"'{target}' is no host: write [user@]host[:port], for example {getpass.getuser()}@192.168.1.10"
        )
    given = {key: value for key, value in match.groupdict().items() if value}
    address = given["address"].strip("[]")
    try:
        asked = subprocess.run(["ssh", *ssh_options(), "-G", address], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("no ssh client on this machine: install OpenSSH") from None
    configured = dict(line.partition(" ")[::2] for line in asked.stdout.splitlines())
    port = int(given.get("port") or configured.get("port") or 22)
    if not 1 <= port <= 65535:
        raise UserError(f"'{target}': a port is a number from 1 to 65535")
    return Host(
        address=configured.get("hostname", address),
        user=given.get("user") or configured.get("user") or getpass.getuser(),
        ssh_port=port,
        os="linux",
    )


def described(host: Host, facts: Facts) -> dict[str, Any]:
    """The keys of an inventory's host; those that are as by default are left out."""
    told: dict[str, Any] = {"address": host.address, "user": host.user}
    if host.ssh_port != 22:
        told["ssh_port"] = host.ssh_port
    system = facts.system.os
    if system not in ("linux", "macos"):
        raise UserError(f"{host.user}@{host.address} runs {system}: Ray's cluster takes Linux and macOS")
    told["os"] = system
    fitting = [name for name, one in facts.pythons.items() if one.version.startswith(("3.11.", "3.12.", "3.13."))]
    if fitting and "python3.11" not in fitting:
        told["python"] = fitting[0]
    if system == "macos":
        told["mps"] = int(facts.system.arch == "arm64")
    elif facts.systemd is not None and not facts.systemd.running:
        told["supervisor"] = "runit"
    if facts.nvidia is not None and facts.nvidia.cards:
        told["cards"] = [described_card(card) for card in facts.nvidia.cards]
    return told


def described_card(card: CardFacts) -> dict[str, Any]:
    """A card as an inventory has it. Its slot should give what card and board together can; where the driver does not
    tell, generation 4 and 16 lanes are assumed."""
    size = (card.memory_bytes or 16 * GIB) / GIB
    width = card.width_max or card.width or 16
    return {
        "model": card_model(card.name),
        "memory_gb": min(MEMORY_SIZES, key=lambda box: abs(box - size)),
        "pcie": {"generation": card.generation_max or card.generation or 4, "width": width},
        "uuid": card.uuid if card.uuid.startswith("GPU-") else "",
    }


def notes(inventory: Inventory, found: dict[str, Facts]) -> dict[str, str]:
    """What stands above each host in the file: what it said of itself; and above a storage that nobody knew."""
    about = {}
    for name, facts in found.items():
        system, nvidia = facts.system, facts.nvidia
        words = [system.hostname, system.name, system.chip, f"{system.cpus} CPUs", gib(system.memory_bytes)]
        driver = f"driver {nvidia.driver}, CUDA {nvidia.cuda}" if nvidia else facts.missing.get("NVIDIA driver", "")
        about[f"hosts.{name}"] = ", ".join(filter(None, [*words, driver]))
    mounted = all(_holds(facts.shared_mounts or [], inventory.storage) for facts in found.values())
    if not mounted and inventory.storage.startswith("/"):
        about["storage"] = (
            "No network file system that all hosts mount holds this path: mount one there, or name another."
        )
    return about


def _holds(mounts: list[str], path: str) -> bool:
    return any(PurePosixPath(path).is_relative_to(mount) for mount in mounts)


def _name(facts: Facts, taken: list[str]) -> str:
    words = re.findall(r"[a-z0-9]+", facts.system.hostname.lower().split(".")[0])
    name = "-".join(words)[:28].strip("-") or "host"
    return name if name not in taken else next(f"{name}-{n}" for n in range(2, 100) if f"{name}-{n}" not in taken)


def _shared_mount(found: list[Facts]) -> str:
    """The network file system that every host mounts at the same place; the shortest path of several."""
    common = set.intersection(*(set(facts.shared_mounts or []) for facts in found))
    return min(common, key=lambda path: (len(PurePosixPath(path).parts), path), default="")
