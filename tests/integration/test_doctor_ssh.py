"""``cluster init --discover`` and ``cluster doctor`` over a real sshd: two "hosts" on loopback, each with a home and
NVIDIA cards of its own (the lab's stand-in for the driver library)."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000, Card, library, write_cards

from cluster.inventory import Inventory, Ports, read_inventory
from workbench.config import CHECKOUT, dump

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.skipif(
        SSHD is None or shutil.which("ssh") is None, reason="needs Debian's openssh-server and a client"
    ),
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="needs Linux, where all of 127.0.0.0/8 is loopback"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in driver library"),
]
ADDRESSES = {"a": "127.0.0.2", "b": "127.0.0.3"}
CARDS = {"a": [RTX_5090, RTX_PRO_6000], "b": [RTX_5060_TI]}


@dataclass
class Hosts:
    """Both hosts, reached by ``ssh_options``; ``folder`` has a home, cards and a log for each."""

    folder: Path
    port: int
    ssh_options: str

    def home(self, name: str) -> Path:
        return self.folder / name

    def cards(self, name: str, cards: list[Card]) -> None:
        write_cards(self.folder / f"{name}.cards", cards, driver="580.105.08", cuda=13000)

    def token(self, name: str, content: str = "6" * 64, mode: int = 0o600) -> None:
        file = self.home(name) / ".workbench" / "token"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        file.chmod(mode)

    def workbench(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        variables = {**os.environ, "WORKBENCH_SSH_OPTIONS": self.ssh_options}
        command = [sys.executable, "-m", "workbench", "cluster", *arguments]
        return subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("ssh")
    driver = library(folder).parent
    port = free_ports(1)[0]
    for key in ("user", "host"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    host_key = (folder / "host.pub").read_text()
    known = "".join(f"[{address}]:{port} {host_key}" for address in ADDRESSES.values())
    (folder / "known_hosts").write_text(known)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    daemons = []
    for name, address in ADDRESSES.items():
        (folder / name).mkdir()
        (folder / f"{name}.conf").write_text(
            f"Port {port}\nListenAddress {address}\nHostKey {folder}/host\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\n"
            f"UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
            f"PermitRootLogin prohibit-password\nMaxStartups 50\n"
            f"SetEnv HOME={folder}/{name} LD_LIBRARY_PATH={driver} NVML_STUB_CARDS={folder}/{name}.cards "
            f"PATH={os.environ['PATH']}\n"
        )
        with (folder / f"{name}.log").open("w") as log:
            assert SSHD is not None
            daemons.append(subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / f"{name}.conf")], stderr=log))
    options = f"-F none -i {folder}/user -o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts"
    try:
        for address in ADDRESSES.values():
            wait_for_port(address, port)
        yield Hosts(folder, port, options)
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(10)


@pytest.fixture
def hosts(machines: Hosts) -> Hosts:
    """Both hosts in good health."""
    for name in ADDRESSES:
        machines.cards(name, CARDS[name])
        machines.token(name)
    return machines


@pytest.fixture
def discovered(hosts: Hosts, tmp_path: Path) -> Path:
    """The inventory that ``init --discover`` writes, with ports that are free and an environment that exists."""
    file, storage = tmp_path / "cluster.yaml", tmp_path / "storage"
    storage.mkdir()
    targets = [f"{getpass.getuser()}@{address}:{hosts.port}" for address in ADDRESSES.values()]
    done = hosts.workbench("init", "--discover", *targets, str(file), "--storage", str(storage))
    assert done.returncode == 0, done.stderr
    inventory = read_inventory(file).model_dump(mode="json", exclude_unset=True)
    keys = [key for key in Ports.model_fields if key != "workers"]
    ports = dict(zip(keys, free_ports(len(keys)), strict=True))
    first = next(port for port in range(30000, 31000, 2) if not {port, port + 1} & set(ports.values()))
    inventory["ports"] = {**ports, "workers": [first, first + 1]}
    for host in inventory["hosts"].values():
        host["environment"] = sys.prefix
    file.write_text(dump(inventory))
    return file


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.2", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for_port(address: str, port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((address, port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def change(file: Path, **values: Any) -> Inventory:
    """Set keys of the inventory, dots written as ``__``."""
    data = yaml.safe_load(file.read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        level = data
        for parent in parents:
            level = level[int(parent)] if isinstance(level, list) else level[parent]
        level[last] = value
    file.write_text(dump(data))
    return read_inventory(file)


def examine(hosts: Hosts, file: Path) -> tuple[int, dict[tuple[int, str], dict[str, str]]]:
    """The doctor's exit code, and its rows by host (0 or 1, in the inventory's order) and check."""
    done = hosts.workbench("doctor", "--inventory", str(file), "--json")
    assert done.stdout, done.stderr
    names = list(read_inventory(file).hosts)
    rows = {(names.index(row["host"]), row["check"]): row for row in json.loads(done.stdout)["rows"]}
    assert all(row["remedy"] for row in rows.values() if row["state"] != "ok")
    return done.returncode, rows


def failed(rows: dict[tuple[int, str], dict[str, str]]) -> set[tuple[int, str]]:
    return {key for key, row in rows.items() if row["state"] == "failed"}


def test_discover_writes_what_the_hosts_report(hosts: Hosts, discovered: Path) -> None:
    inventory = read_inventory(discovered)
    a, b = inventory.hosts.values()
    assert (a.address, b.address, a.ssh_port, a.user) == (*ADDRESSES.values(), hosts.port, getpass.getuser())
    assert [(card.model, card.memory_gb, card.uuid) for card in a.cards] == [
        ("rtx-5090", 32, RTX_5090.uuid),
        ("rtx-pro-6000", 96, RTX_PRO_6000.uuid),
    ]
    assert [(card.model, card.pcie.generation, card.pcie.width) for card in b.cards] == [("rtx-5060-ti", 5, 8)]
    assert inventory.head == next(iter(inventory.hosts))


def test_discover_keeps_an_inventory_that_is_there(hosts: Hosts, discovered: Path) -> None:
    before = discovered.read_text()
    done = hosts.workbench("init", "--discover", f"127.0.0.2:{hosts.port}", str(discovered))
    assert (done.returncode, discovered.read_text()) == (2, before)
    assert "--force" in done.stderr


def test_healthy_hosts_pass(hosts: Hosts, discovered: Path) -> None:
    code, rows = examine(hosts, discovered)
    assert failed(rows) == set()
    assert code == 0
    assert rows[1, "Python"]["seen"].startswith(sys.version.split()[0])
    assert rows[0, "card 1"]["state"] == rows[1, "PCIe of card 0"]["state"] == rows[0, "token"]["state"] == "ok"
    assert rows[0, "storage"]["state"] == rows[1, "storage"]["state"] == "ok"
    assert "ports open" in rows[0, f"ports from {list(read_inventory(discovered).hosts)[1]}"]["seen"]


def test_the_visit_leaves_nothing_behind(hosts: Hosts, discovered: Path) -> None:
    before = {path: path.read_bytes() for path in hosts.folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    inventory = read_inventory(discovered)
    examine(hosts, discovered)
    after = {path: path.read_bytes() for path in hosts.folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert after == before
    assert list(Path(inventory.storage).iterdir()) == []
    with socket.socket() as one:
        one.bind((ADDRESSES["a"], inventory.ports.gcs))


def test_each_planted_fault_is_found_and_nothing_else(hosts: Hosts, discovered: Path) -> None:
    hosts.token("b", mode=0o644)
    hosts.cards("a", [replace(RTX_5090, pcie_width=4), RTX_PRO_6000])
    name = list(read_inventory(discovered).hosts)[1]
    change(discovered, **{f"hosts__{name}__cards__0__model": "rtx-5090"})
    code, rows = examine(hosts, discovered)
    assert failed(rows) == {(1, "token"), (0, "PCIe of card 0"), (1, "card 0")}
    assert code == 1
    assert "chmod 600 ~/.workbench/token" in rows[1, "token"]["remedy"]
    assert "5.0 x4" in rows[0, "PCIe of card 0"]["seen"] and rows[0, "PCIe of card 0"]["expected"] == "5.0 x16"
    assert f"hosts.{name}.cards.0.model: rtx-5060-ti" in rows[1, "card 0"]["remedy"]


def test_a_storage_that_is_missing_fails_on_every_host(hosts: Hosts, discovered: Path, tmp_path: Path) -> None:
    change(discovered, storage=str(tmp_path / "not-mounted"))
    code, rows = examine(hosts, discovered)
    assert (code, failed(rows)) == (1, {(0, "storage"), (1, "storage")})
    assert "mount -t nfs" in rows[0, "storage"]["remedy"]


def test_storage_that_two_hosts_do_not_share_fails(hosts: Hosts, discovered: Path) -> None:
    change(discovered, storage="/proc/self")  # a folder that is there, and another one for every process
    code, rows = examine(hosts, discovered)
    assert (code, failed(rows)) == (1, {(0, "storage"), (1, "storage")})


def test_another_token_on_one_host_is_found_without_showing_it(hosts: Hosts, discovered: Path) -> None:
    hosts.token("b", "secretword" * 6)
    done = hosts.workbench("doctor", "--inventory", str(discovered), "--json")
    assert "another token than on" in done.stdout
    assert "secretword" not in done.stdout + done.stderr


def test_another_python_on_one_host_is_found(hosts: Hosts, discovered: Path) -> None:
    other = next((path for path in map(shutil.which, ("python3.12", "python3.13", "python3.10")) if path), None)
    system = Path("/usr/bin/python3")
    if other is None and not system.exists():
        pytest.skip("needs a second Python")
    made = hosts.folder / "other"
    made.joinpath("bin").mkdir(parents=True, exist_ok=True)
    python = made / "bin" / "python"
    python.unlink(missing_ok=True)
    python.symlink_to(system if system.exists() else str(other))
    name = list(read_inventory(discovered).hosts)[1]
    change(discovered, **{f"hosts__{name}__environment": str(made)})
    _, rows = examine(hosts, discovered)
    assert {(1, "Python"), (1, "packages")} <= failed(rows)


def test_a_program_that_holds_a_port_of_rays_is_named(hosts: Hosts, discovered: Path) -> None:
    port = read_inventory(discovered).ports.metrics
    holder = subprocess.Popen([sys.executable, "-m", "http.server", "--bind", "127.0.0.2", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for_port("127.0.0.2", port)
        _, rows = examine(hosts, discovered)
    finally:
        holder.terminate()
        holder.wait()
    assert f"{port} by python" in rows[0, "ports taken"]["seen"]
    assert "ports.metrics" in rows[0, "ports taken"]["remedy"]


def test_a_host_that_does_not_answer_is_one_failed_row(hosts: Hosts, discovered: Path) -> None:
    name = list(read_inventory(discovered).hosts)[1]
    change(discovered, **{f"hosts__{name}__ssh_port": free_ports(1)[0]})
    code, rows = examine(hosts, discovered)
    assert (code, failed(rows)) == (1, {(1, "ssh")})
    assert {check for host, check in rows if host == 1} == {"ssh"}
    assert "Connection refused" in rows[1, "ssh"]["seen"] and rows[1, "ssh"]["remedy"].startswith("ssh ")


def test_the_table_says_what_to_type(hosts: Hosts, discovered: Path) -> None:
    hosts.token("a", mode=0o640)
    done = hosts.workbench("doctor", "--inventory", str(discovered))
    assert done.returncode == 1
    assert "has mode 0640: others can read it" in done.stdout
    assert "type:     ssh -t" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, ")
