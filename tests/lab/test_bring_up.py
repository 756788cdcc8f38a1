"""``cluster up`` twice, ``status``, a change, ``down``: from the laptop, on hosts that keep other things running."""

from collections.abc import Iterator

import pytest

from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000
from lab.host import USER
from lab.lab import Lab
from lab.site import BOX, HEAD, Site

pytestmark = pytest.mark.lab
OURS = "#!/bin/sh\ncd\n[ -f started ] && touch again\ntouch started\nexec sleep 9999\n"


@pytest.fixture(scope="module")
def hosts(can_lab: None) -> Iterator[Site]:
    """Two hosts and an inventory; the user has a service of their own on each."""
    with Lab.start({HEAD: [RTX_5090, RTX_PRO_6000], BOX: [RTX_5060_TI]}) as lab:
        site = Site(lab, cpus=1)
        site.discover()
        for name in (HEAD, BOX):
            lab[name].write(f"/home/{USER}/own/run", OURS, 0o755, root=False)
            lab[name].run("mkdir -p ~/service && ln -s ~/own ~/service/own")
        yield site


def rays(site: Site) -> dict[str, set[int]]:
    return {name: site.rays(name) for name in site.members}


def test_dry_run_touches_nothing(hosts: Site) -> None:
    printed = hosts.workbench("cluster up --dry-run").stdout
    for word in ("RAY_AUTH_MODE=token", "RAY_grpc_client_keepalive_time_ms=5000", "rtx-pro-6000", "--block", HEAD, BOX):
        assert word in printed
    assert hosts.lab[HEAD].run("ls ~/.workbench", check=False).returncode == 2


def test_up_brings_the_cluster_up_and_again_changes_nothing(hosts: Site) -> None:
    first = hosts.workbench("cluster up --yes")
    assert "changed: " in first.stderr
    running = rays(hosts)
    assert all(len(pids) == 1 for pids in running.values())
    again = hosts.workbench("cluster up --yes")
    assert "nothing to change" in again.stderr
    assert rays(hosts) == running


def test_status_names_hosts_cards_and_versions(hosts: Site) -> None:
    status = hosts.status()
    assert {name: host["in_cluster"] for name, host in status["hosts"].items()} == {HEAD: True, BOX: True}
    assert [card["model"] for card in status["hosts"][HEAD]["cards"]] == ["rtx-5090", "rtx-pro-6000"]
    assert status["hosts"][HEAD]["total"]["GPU"] == 1, "the reserved card is no plain GPU"
    assert status["hosts"][BOX]["total"]["rtx-5060-ti"] == 1
    assert all(host["current"] and host["versions"]["ray"] for host in status["hosts"].values())
    assert hosts.workbench("cluster status").stdout.count("alive") == 2


def test_nothing_secret_is_readable_by_others_or_rendered(hosts: Site) -> None:
    token = hosts.lab[HEAD].run("cat ~/.workbench/token").stdout.strip()
    assert len(token) >= 32
    for name in hosts.members:
        host = hosts.lab[name]
        assert host.run("stat -c %a ~/.workbench/token").stdout.strip() == "600"
        search = "grep -rlFf - ~ /tmp /srv/storage /proc/[0-9]*/cmdline 2>/dev/null"
        found = host.run(search, stdin=token, check=False).stdout
        assert found.split() == [f"/home/{USER}/.workbench/token"]


def test_a_change_restarts_only_the_host_that_it_is_for(hosts: Site) -> None:
    before = rays(hosts)
    inventory = hosts.inventory()
    inventory["hosts"][BOX]["labels"] = {"rack": "moved"}
    hosts.write(inventory)
    hosts.workbench("cluster up --yes")
    after = rays(hosts)
    assert after[HEAD] == before[HEAD] and after[BOX].isdisjoint(before[BOX])
    assert hosts.in_cluster() == {HEAD, BOX}


def test_a_new_token_locks_the_old_one_out(hosts: Site) -> None:
    old = hosts.lab[HEAD].run("cat ~/.workbench/token").stdout
    hosts.workbench("cluster rotate-token --yes")
    new = hosts.lab[HEAD].run("cat ~/.workbench/token").stdout
    assert new != old and hosts.lab[BOX].run("cat ~/.workbench/token").stdout == new
    assert hosts.in_cluster() == {HEAD, BOX}


def test_down_ends_ray_and_nothing_else(hosts: Site) -> None:
    own = {name: set(hosts.lab[name].processes("sleep 9999")) for name in hosts.members}
    hosts.workbench("cluster down --yes")
    for name in hosts.members:
        assert not hosts.lab[name].processes("ray"), "no process of Ray's"
        assert set(hosts.lab[name].processes("sleep 9999")) == own[name] != set()
        assert hosts.lab[name].run("ls ~/service").stdout.split() == ["own"]
        assert hosts.lab[name].run("ls ~/again", check=False).returncode == 2
    assert hosts.workbench("cluster status", check=False).returncode == 1
    assert hosts.workbench("cluster down --yes").returncode == 0, "again is no mistake"
