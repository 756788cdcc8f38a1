"""The inventory: what it refuses and how, and the annotated file that ``cluster init`` writes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_cluster import INVENTORY

from cluster.cards import card_model
from cluster.discover import described_card, reachable
from cluster.facts import CardFacts
from cluster.inventory import Card, Host, Inventory, PcieLink, Ports, read_inventory
from cluster.inventory_file import annotated, three_machines
from workbench.cli import main
from workbench.config import dump
from workbench.errors import UserError

DEFAULT_LINE = re.compile(r"^(?P<indent>\s*)# (?P<rest>(  )?[a-z_0-9]+: ?.*)$", re.MULTILINE)


def refused(tmp_path: Path, old: str, new: str) -> str:
    """What is said of the three machines' file after ``old`` became ``new`` in it."""
    text = annotated(three_machines("ada"))
    assert old in text
    file = tmp_path / "cluster.yaml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        read_inventory(file)
    return str(error.value)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_the_annotated_file_reads_back_as_the_three_machines(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(annotated(three_machines("ada")))
    inventory = read_inventory(file)
    assert inventory == three_machines("ada")
    cards = {name: [card.model for card in host.cards] for name, host in inventory.hosts.items()}
    assert cards == {"linux-box": ["rtx-5060-ti"], "system-a": ["rtx-5090", "rtx-pro-6000"], "macbook": []}
    assert inventory.hosts["macbook"].mps == 1


def test_every_key_is_explained() -> None:
    text = annotated(three_machines("ada"))
    for model in (Inventory, Host, Card, Ports):
        for key, field in model.model_fields.items():
            assert re.search(rf"^[ #-]*{key}:.*# {re.escape(field.description or '?')}", text, re.MULTILINE), key
    for key in PcieLink.model_fields:
        assert f"{key}:" in text


def test_what_is_commented_out_is_the_default_or_a_valid_example(tmp_path: Path) -> None:
    text = annotated(three_machines("ada"))
    body = "\n".join(
        line for line in text.splitlines() if not line.startswith(("# The ", "# A line", "# Look", "# Put"))
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(DEFAULT_LINE.sub(r"\g<indent>\g<rest>", body))
    inventory = read_inventory(file)
    assert inventory.ports == Ports()
    assert inventory.model_fields_set == set(Inventory.model_fields)
    assert inventory.hosts["system-a"].model_fields_set == set(Host.model_fields)


@pytest.mark.parametrize("inventory", [INVENTORY, three_machines("ada")], ids=["labelled", "example"])
def test_any_inventory_survives_being_written(inventory: Inventory, tmp_path: Path) -> None:
    changed = inventory.model_dump(mode="json", exclude_unset=True)
    changed |= {"name": "12", "ports": {"gcs": 7000, "workers": [30000, 30100]}, "open_cluster": True}
    first = next(iter(changed["hosts"].values()))
    first |= {
        "labels": {"room": "attic: left"},
        "environment": "/opt/my env",
        "nccl_p2p": False,
        "object_store_gb": 2.5,
    }
    whole = Inventory.model_validate(changed)
    file = tmp_path / "cluster.yaml"
    file.write_text(annotated(whole, notes={}))
    assert read_inventory(file) == whole


def test_an_unknown_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    said = refused(tmp_path, "address: 192.168.1.10", "adress: 192.168.1.10")
    text = (tmp_path / "cluster.yaml").read_text()
    assert f"cluster.yaml:{line_of(text, 'adress')}: unknown key 'hosts.system-a.adress'" in said
    assert "did you mean 'hosts.system-a.address'?" in said


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("head: system-a", "head: system-b", "'system-b' is not among the hosts system-a, linux-box, macbook"),
        ("head: system-a", "head: macbook", "is a Mac, which sleeps"),
        ("192.168.1.12", "192.168.1.10", "two hosts have one address"),
        ("192.168.1.12", "999.1.2.3", "999.1.2.3"),
        ("192.168.1.12", "192.168.1.12; touch x", "address"),
        ("192.168.1.12", "'[fd00::11]'", "address"),
        ("storage: /srv/workbench", "storage: srv", "give an absolute path that all hosts mount, or s3://"),
        ("width: 8}", "width: 7}", "hosts.linux-box.cards.0.pcie.width"),
        ("    mps: 1", "    cards: [{model: m, memory_gb: 1, pcie: {generation: 4, width: 8}}]", "a Mac has no"),
        ("model: rtx-5090", "model: RTX 5090", "hosts.system-a.cards.0.model"),
        ("model: rtx-5090", "model: mps", "means something else in requests"),
        ("head: system-a", "head: sytem-a", "did you mean 'system-a'?"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in refused(tmp_path, old, new)


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ({"gcs": 8265}, "gcs and dashboard have one port: 8265"),
        ({"metrics": 20500}, "lies among the workers' ports"),
        ({"workers": [300, 200]}, "not a range of ports"),
    ],
)
def test_ports_must_be_distinct(ports: dict[str, Any], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(dump(three_machines("ada").model_dump(mode="json", exclude_unset=True) | {"ports": ports}))
    with pytest.raises(UserError, match=expected):
        read_inventory(file)


def test_a_missing_inventory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'workbench cluster init' writes one"):
        read_inventory(tmp_path / "cluster.yaml")


@pytest.mark.parametrize(
    ("nvml", "model"),
    [
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA GeForce RTX 5060 Ti", "rtx-5060-ti"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_a_discovered_card_has_the_name_that_people_use(nvml: str, model: str) -> None:
    assert card_model(nvml) == model


def test_a_discovered_card_has_the_memory_on_the_box_and_its_best_link() -> None:
    card = CardFacts(index=0, name="NVIDIA GeForce RTX 5090", uuid="GPU-1", memory_bytes=32_607 << 20,
                     generation=1, generation_max=5, width=4, width_max=16)  # fmt: skip
    assert described_card(card) == {
        "model": "rtx-5090", "memory_gb": 32, "pcie": {"generation": 5, "width": 16}, "uuid": "GPU-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "address", "user", "port"),
    [
        ("ada@10.0.0.2", "10.0.0.2", "ada", 22),
        ("ada@10.0.0.2:2222", "10.0.0.2", "ada", 2222),
        ("ada@[fe80::1]:2222", "fe80::1", "ada", 2222),
        ("ada@box.local", "box.local", "ada", 22),
    ],
)
def test_a_target_is_user_host_and_port(
    target: str, address: str, user: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_SSH_OPTIONS", "-F none")
    host = reachable(target)
    assert (host.address, host.user, host.ssh_port) == (address, user, port)


def test_a_target_that_the_users_ssh_knows_is_resolved_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "ssh_config"
    config.write_text("Host box\n  HostName 10.0.0.7\n  User ada\n  Port 2200\n")
    monkeypatch.setenv("WORKBENCH_SSH_OPTIONS", f"-F {config}")
    host = reachable("box")
    assert (host.address, host.user, host.ssh_port) == ("10.0.0.7", "ada", 2200)


def test_init_never_overwrites_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("precious")
    assert _exit_code(["cluster", "init", str(file)]) == 2
    assert file.read_text() == "precious"
    assert "--force" in capsys.readouterr().err
    assert _exit_code(["cluster", "init", str(file), "--force"]) == 0
    assert "system-a" in yaml.safe_load(file.read_text())["hosts"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ada@10.0.0.2"], "workbench cluster init --discover ada@10.0.0.2"),
        (["--discover"], "name them"),
        (["a.yaml", "b.yaml"], "two files were given"),
        (["--discover", "a@b@c"], "is no host"),
    ],
)
def test_init_says_what_to_type(arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert _exit_code(["cluster", "init", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)
