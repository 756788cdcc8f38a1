"""``cluster init --discover`` and ``cluster doctor`` from the laptop: healthy hosts, then each fault planted."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000, write_cards
from lab.host import USER
from lab.lab import ROOT, Lab
from lab.site import BOX, HEAD, Site

pytestmark = pytest.mark.lab
DEBIAN_PYTHON = "/usr/bin/python3.11"
CARDS = "/etc/nvidia-cards"


@pytest.fixture(scope="module")
def hosts(can_lab: None) -> Iterator[Site]:
    """Two hosts with an inventory and a token, no Ray."""
    with Lab.start({HEAD: [RTX_5090, RTX_PRO_6000], BOX: [RTX_5060_TI]}) as lab:
        site = Site(lab)
        site.discover()
        for name in (HEAD, BOX):
            lab[name].write(f"/home/{USER}/.workbench/token", "6" * 64, 0o600, root=False)
        yield site


def doctor(site: Site) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the rows that are not ok."""
    done = site.workbench("cluster doctor --json", check=False)
    return done.returncode, [row for row in json.loads(done.stdout)["rows"] if row["state"] != "ok"]


def failures(site: Site) -> dict[tuple[str, str], dict[str, Any]]:
    code, rows = doctor(site)
    failed = {(row["host"], row["check"]): row for row in rows if row["state"] == "failed"}
    assert code == (1 if failed else 0)
    assert all(row["remedy"] for row in rows), "every row that is not ok says what to type"
    return failed


def test_discover_finds_what_the_hosts_have(hosts: Site) -> None:
    found = hosts.inventory()["hosts"]
    assert list(found) == [HEAD, BOX]
    assert [card["model"] for card in found[HEAD]["cards"]] == ["rtx-5090", "rtx-pro-6000"]
    assert [card["memory_gb"] for card in found[HEAD]["cards"]] == [32, 96]
    assert found[BOX]["cards"] == [
        {"model": "rtx-5060-ti", "memory_gb": 16, "pcie": {"generation": 5, "width": 8}, "uuid": RTX_5060_TI.uuid}
    ]
    assert {host["supervisor"] for host in found.values()} == {"runit"}
    assert found[HEAD]["address"] == "10.77.0.11"


def test_healthy_hosts_pass(hosts: Site) -> None:
    assert failures(hosts) == {}


def test_another_python_patch(hosts: Site) -> None:
    box = hosts.lab[BOX]
    there = box.run(f"{DEBIAN_PYTHON} -c 'import platform; print(platform.python_version())'", check=False).stdout
    ours = ".".join(map(str, sys.version_info[:3]))
    if there.strip() in ("", ours) or sys.version_info[:2] != (3, 11):
        pytest.skip(f"the lab needs a second patch of Python 3.11: {DEBIAN_PYTHON} is {there.strip() or 'not here'}")
    box.run(
        f"mkdir -p ~/old/bin ~/old/lib/python3.11 && ln -sfn {DEBIAN_PYTHON} ~/old/bin/python && "
        "echo 'home = /usr/bin' > ~/old/pyvenv.cfg && "
        f"ln -sfn {ROOT}/.venv/lib/python3.11/site-packages ~/old/lib/python3.11/site-packages"
    )
    inventory = hosts.inventory()
    inventory["hosts"][BOX]["environment"] = f"/home/{USER}/old"
    before = hosts.inventory()
    hosts.write(inventory)
    try:
        failed = failures(hosts)
    finally:
        hosts.write(before)
    assert set(failed) == {(BOX, "Python")}
    assert there.strip() in failed[BOX, "Python"]["seen"] and ours in failed[BOX, "Python"]["expected"]


def test_a_card_in_a_slot_of_four_lanes(hosts: Site) -> None:
    file = hosts.lab[HEAD].path(CARDS)
    write_cards(file, [RTX_5090, replace(RTX_PRO_6000, pcie_width=4)])
    try:
        failed = failures(hosts)
    finally:
        write_cards(file, [RTX_5090, RTX_PRO_6000])
    (row,) = failed.values()
    assert row["host"] == HEAD and "x4" in row["seen"]


def test_a_card_that_is_not_in_the_inventory(hosts: Site) -> None:
    file = hosts.lab[BOX].path(CARDS)
    write_cards(file, [RTX_5090])
    try:
        failed = failures(hosts)
    finally:
        write_cards(file, [RTX_5060_TI])
    assert {host for host, _ in failed} == {BOX}


def test_a_clock_that_is_off(hosts: Site) -> None:
    hosts.lab[BOX].shift_clock(90)
    try:
        failed = failures(hosts)
    finally:
        hosts.lab[BOX].shift_clock(0)
    assert set(failed) == {(BOX, "clock")} and "ahead" in failed[BOX, "clock"]["seen"]


def test_a_token_that_all_can_read(hosts: Site) -> None:
    hosts.lab[BOX].run("chmod 644 ~/.workbench/token")
    try:
        failed = failures(hosts)
    finally:
        hosts.lab[BOX].run("chmod 600 ~/.workbench/token")
    assert set(failed) == {(BOX, "token")} and "chmod" in failed[BOX, "token"]["remedy"]


def test_a_blocked_port(hosts: Site) -> None:
    with _blocked(hosts, BOX, 6380):
        failed = failures(hosts)
    assert set(failed) == {(BOX, f"ports from {HEAD}")}
    assert "6380" in failed[BOX, f"ports from {HEAD}"]["seen"]


def test_storage_that_cannot_be_written(hosts: Site) -> None:
    with _mounted(hosts, BOX, "-o ro"):
        failed = failures(hosts)
    assert (BOX, "storage") in failed and {check for _, check in failed} == {"storage"}


def test_storage_that_is_not_the_same(hosts: Site) -> None:
    with _mounted(hosts, BOX, "-o mode=1777"):
        failed = failures(hosts)
    assert set(failed) == {(BOX, "storage"), (HEAD, "storage")}


def test_a_host_that_does_not_answer(hosts: Site) -> None:
    hosts.lab.cut(BOX)
    try:
        failed = failures(hosts)
    finally:
        hosts.lab.mend(BOX)
    assert set(failed) == {(BOX, "ssh")}


@contextmanager
def _blocked(site: Site, name: str, port: int) -> Iterator[None]:
    host = site.lab[name]
    host.run(
        "nft add table inet fault && nft 'add chain inet fault input { type filter hook input priority 0; }' && "
        f"nft add rule inet fault input iifname eth0 tcp dport {port} drop",
        root=True,
    )
    try:
        yield
    finally:
        host.run("nft delete table inet fault", root=True)


@contextmanager
def _mounted(site: Site, name: str, options: str) -> Iterator[None]:
    """Another file system over the shared storage of one host."""
    site.lab[name].run(f"mount -t tmpfs {options} other /srv/storage", root=True)
    try:
        yield
    finally:
        site.lab[name].run("umount /srv/storage", root=True)
