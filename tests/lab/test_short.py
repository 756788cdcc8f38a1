"""A small lab in every test run: two hosts, ssh, one cluster over them, a card by name."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000, write_cards
from lab.lab import STATE, Lab, remove_stale
from lab.site import BOX, HEAD, Site

SEE = """
import os, ray
from cluster.nodes import member_nodes
from cluster.placement import place
from workbench.resources import ResourceRequest
ray.init(log_to_driver=False)
options = place(ResourceRequest.model_validate({"gpu": "%s"}), member_nodes()).options()
see = ray.remote(max_retries=0)(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.uname().nodename)).options(**options)
print(*ray.get(see.remote(), timeout=60))
"""


@pytest.fixture(scope="module")
def small(can_lab: None) -> Iterator[Lab]:
    with Lab.start({HEAD: [RTX_5090, RTX_PRO_6000], BOX: [RTX_5060_TI]}) as lab:
        yield lab


def test_hosts_are_apart(small: Lab) -> None:
    for name in (HEAD, BOX):
        assert small.laptop.run(f"ssh {name} hostname").stdout.strip() == name
    small[BOX].run("touch /tmp/here /dev/shm/here ~/here; sleep 300 >/dev/null 2>&1 &")
    assert small[BOX].processes("sleep 300") and not small[HEAD].processes("sleep 300")
    assert small[HEAD].run("ls /tmp/here /dev/shm/here ~/here", check=False).returncode == 2
    assert small[HEAD].run("ip -o link").stdout.count("\n") == 2, "loopback and eth0"


def test_a_cut_link_is_silent_and_mends(small: Lab) -> None:
    reach = f"timeout 3 bash -c '</dev/tcp/{BOX}/22'"
    assert small.laptop.run(reach, check=False).returncode == 0
    small.cut(BOX)
    assert small.laptop.run(reach, check=False).returncode == 124, "no answer, and no refusal"
    assert small[BOX].run("cat /sys/class/net/eth0/carrier").stdout.strip() == "1"
    small.mend(BOX)
    assert small.laptop.run(reach, check=False).returncode == 0


def test_a_clock_is_shifted_and_set_right(small: Lab) -> None:
    def ahead() -> float:
        there, here = small.laptop.run(f"ssh {BOX} date +%s; date +%s").stdout.split()
        return int(there) - int(here)

    small[BOX].shift_clock(90)
    assert 88 <= ahead() <= 92
    small[BOX].shift_clock(0)
    assert abs(ahead()) <= 2


def test_cards_are_those_of_the_file_and_change_with_it(small: Lab) -> None:
    code = "import pynvml as n; n.nvmlInit(); d = n.nvmlDeviceGetHandleByIndex(0); " \
           "print(n.nvmlDeviceGetUUID(d), n.nvmlDeviceGetUtilizationRates(d).gpu)"  # fmt: skip
    line = f"ssh {BOX} {sys.prefix}/bin/python -c \"'{code}'\""
    assert small.laptop.run(line).stdout.split() == [RTX_5060_TI.uuid, "0"]
    write_cards(small[BOX].path("/etc/nvidia-cards"), [replace(RTX_5060_TI, utilization=77)])
    assert small.laptop.run(line).stdout.split() == [RTX_5060_TI.uuid, "77"]
    write_cards(small[BOX].path("/etc/nvidia-cards"), [RTX_5060_TI])


def test_a_killed_lab_is_gone_and_the_next_start_removes_its_files(can_lab: None) -> None:
    code = "import os; from lab.lab import Lab; lab = Lab.start({'a': []}); os.kill(os.getpid(), 9)"
    folder = Path(__file__).resolve().parents[1]
    killed = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(folder)})
    assert killed.wait(60) == -9
    left = STATE / f"{killed.pid}-0"
    assert left.exists()
    remove_stale()
    assert not left.exists()
    listed = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert not [e for e in listed if str(left).encode() in _command(e)]


def test_a_cluster_over_it_gives_the_card_that_is_named(small: Lab) -> None:
    site = Site(small)
    site.discover()
    site.workbench("cluster up --yes")
    assert site.in_cluster() == {HEAD, BOX}
    for model, card, host in (("rtx-pro-6000", RTX_PRO_6000, HEAD), ("rtx-5060-ti", RTX_5060_TI, BOX)):
        seen = site.python(HEAD, SEE % model)
        assert seen.split() == [card.uuid, host]


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
