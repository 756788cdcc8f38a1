"""The probe: run as it is on a host, by a Python without our packages, and held against what the system says itself."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab.cards import RTX_5090, RTX_PRO_6000, library, write_cards

from cluster import probe
from cluster.facts import Facts
from cluster.peer_copy import wrong_bytes
from cluster.remote_python import PEER_COPY, PROBE, TRIAL

SCRIPTS = [PROBE, TRIAL, PEER_COPY]


def run(asked: dict[str, Any], *, python: str = sys.executable, **variables: str) -> dict[str, Any]:
    """What the probe prints, run as ssh runs it: from its input, isolated from this checkout."""
    done = subprocess.run(
        [python, "-I", "-", json.dumps(asked)],
        input=PROBE.read_text(), capture_output=True, text=True, env={**os.environ, **variables}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return run({"environment": sys.prefix, "interpreter": sys.executable})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_for_hosts_is_python_3_8_and_the_standard_library(script: Path) -> None:
    tree = ast.parse(script.read_text(), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    elsewhere = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert elsewhere <= {"torch", "pyarrow"}  # a host's environment has them, and they are asked for only there


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with /proc")
def test_sizes_are_the_systems(facts: dict[str, Any]) -> None:
    system = facts["system"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (system["os"], system["cpus"], system["memory_bytes"]) == ("linux", os.cpu_count(), pages)
    assert system["shm_bytes"] == shutil.disk_usage("/dev/shm").total
    assert system["hostname"] == socket.gethostname()


def test_the_environment_is_told_to_the_patch(facts: dict[str, Any]) -> None:
    from importlib.metadata import version

    environment = facts["environment"]
    assert environment["python"] == sys.version.split()[0]
    assert {name: environment["packages"][name] for name in ("ray", "torch")} == {
        "ray": version("ray"),
        "torch": version("torch"),
    }
    assert facts["pythons"][sys.executable]["version"] == sys.version.split()[0]


def test_the_cuda_of_torch_is_read_without_importing_it(facts: dict[str, Any]) -> None:
    import torch

    assert facts["environment"]["torch_cuda"] == torch.version.cuda


def test_the_facts_have_their_types(facts: dict[str, Any]) -> None:
    assert Facts.model_validate(facts).system.os == facts["system"]["os"]


def test_what_a_host_lacks_is_named_with_the_reason_and_is_not_zero(tmp_path: Path) -> None:
    facts = run({"environment": str(tmp_path / "none")}, LD_LIBRARY_PATH=str(tmp_path))
    assert facts["environment"] is None
    assert facts["missing"]["environment"] == f"no such file: {tmp_path}/none/bin/python"
    if shutil.which("nvidia-smi") is None:
        assert facts["nvidia"] is None
        assert "libnvidia-ml.so.1" in facts["missing"]["NVIDIA driver"]


def test_a_secret_is_told_by_mode_and_salted_digest_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("opensesame\n")
    file.chmod(0o640)
    one, again, other = (run({"token_file": str(file), "salt": salt})["token_file"] for salt in ("a", "a", "b"))
    assert one == again
    assert (one["exists"], one["mode"], one["owned"]) == (True, "0640", True)
    assert one["digest"] != other["digest"]
    assert "opensesame" not in json.dumps([one, other])
    assert run({"token_file": str(tmp_path / "none")})["token_file"] == {"exists": False}


def test_a_storage_that_is_not_there_is_measured_where_it_would_be(tmp_path: Path) -> None:
    storage = run({"storage": str(tmp_path / "not" / "mounted")})["storage"]
    assert storage["exists"] is False
    assert storage["total_bytes"] == shutil.disk_usage(tmp_path).total


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net")
def test_a_port_that_is_taken_is_told_with_its_program(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    (found,) = run({"ports": [port]})["listening"]
    assert (found["port"], found["address"]) == (port, "127.0.0.1")
    assert found["program"] == Path(psutil.Process().cmdline()[0].split()[0]).name
    assert run({"ports": []})["listening"] == []


@pytest.mark.skipif(sys.byteorder != "little", reason="/proc/net is in the machine's byte order")
def test_addresses_of_proc_are_read() -> None:
    assert probe.address_of("0100007F") == "127.0.0.1"
    assert probe.address_of("00000000000000000000000001000000") == "::1"


def test_of_rays_variables_only_switches_are_told(tmp_path: Path) -> None:
    (tmp_path / "ray.env").write_text("# made\nRAY_AUTH_MODE=token\nHF_TOKEN=opensesame\nNCCL_P2P_DISABLE=1\n")
    assert run({"folder": str(tmp_path)})["ray_variables"] == {"RAY_AUTH_MODE": "token", "NCCL_P2P_DISABLE": "1"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in driver needs a C compiler and Linux")
    return library(tmp_path_factory.mktemp("driver")).parent


def nvidia(driver: Path, cards: Path) -> dict[str, Any]:
    return run({}, LD_LIBRARY_PATH=str(driver), NVML_STUB_CARDS=str(cards))


def test_cards_are_told_with_their_link_now_and_at_most(driver: Path, tmp_path: Path) -> None:
    file = tmp_path / "cards"
    slow = replace(RTX_5090, pcie_generation=1, pcie_width=4, memory_used=1 << 30)
    write_cards(file, [slow, replace(RTX_PRO_6000, processes=((7, 1 << 30), (8, 1 << 30)))], driver="580.1", cuda=12090)
    found = nvidia(driver, file)["nvidia"]
    assert (found["driver"], found["cuda"]) == ("580.1", "12.9")
    first, second = found["cards"]
    assert (first["name"], first["uuid"], first["memory_bytes"]) == (slow.name, slow.uuid, slow.memory)
    assert (first["generation"], first["generation_max"], first["width"], first["width_max"]) == (1, 5, 4, 16)
    assert first["free_bytes"] == slow.memory - (1 << 30)
    assert (first["processes"], second["processes"]) == (0, 2)
    assert found["peers"] == {"0->1": True, "1->0": True}


def test_a_path_between_cards_that_the_driver_refuses_is_told(driver: Path, tmp_path: Path) -> None:
    file = tmp_path / "cards"
    write_cards(file, [RTX_5090, RTX_PRO_6000], p2p=2)
    assert nvidia(driver, file)["nvidia"]["peers"] == {"0->1": False, "1->0": False}


def test_a_sensor_that_a_card_lacks_is_named(driver: Path, tmp_path: Path) -> None:
    file = tmp_path / "cards"
    write_cards(file, [replace(RTX_5090, pcie_width=None)])
    facts = nvidia(driver, file)
    assert facts["nvidia"]["cards"][0]["width"] is None
    assert "Not Supported" in facts["missing"]["PCIe width of card 0"]


def test_a_copy_that_arrives_is_intact() -> None:
    """The copy from card to card, between two devices that every torch has."""
    asked = json.dumps({"devices": ["cpu", "cpu:0"], "mib": 1, "repeats": 2})
    done = subprocess.run([sys.executable, "-", asked], input=PEER_COPY.read_text(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(copy["intact"], copy["reason"]) for copy in json.loads(done.stdout)] == [(True, ""), (True, "")]


class Crooked:
    """Bytes of which one changes on its way from card to card."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, device: str, copy: bool = False) -> "Crooked":
        if copy:
            self.content = self.content.clone()
            self.content[3] ^= 1
        return self

    def cpu(self) -> Any:
        return self.content


def test_bytes_that_arrive_wrong_are_counted() -> None:
    import torch

    class BrokenBus:
        """torch on a machine whose cards read each other's memory wrong."""

        uint8, Generator = torch.uint8, torch.Generator

        @staticmethod
        def randint(*arguments: Any, **options: Any) -> Any:
            class Sent(torch.Tensor):
                def to(self, *arguments: Any, **options: Any) -> Any:
                    return Crooked(torch.Tensor.as_subclass(self, torch.Tensor))

            return torch.randint(*arguments, **options).as_subclass(Sent)

    assert wrong_bytes(BrokenBus, "cuda:0", "cuda:1", 4096, repeats=3) == 3


PYTHON_3_8 = Path("~/.pyenv/versions").expanduser()


@pytest.mark.skipif(not list(PYTHON_3_8.glob("3.8.*")), reason="needs a Python 3.8 under ~/.pyenv")
def test_it_runs_under_python_3_8() -> None:
    python = next(PYTHON_3_8.glob("3.8.*")) / "bin" / "python3"
    assert run({"environment": sys.prefix}, python=str(python))["environment"]["python"] == sys.version.split()[0]


MAC_SETTINGS = """\
Battery Power:
 sleep                1
 disksleep            10
AC Power:
 displaysleep         10
 sleep                {minutes} (sleep prevented by powerd)
 disksleep            10
"""


@pytest.mark.parametrize("minutes", [0, 15])
def test_a_macs_sleep_is_that_on_mains_power(minutes: int) -> None:
    assert probe.sleep_minutes(MAC_SETTINGS.format(minutes=minutes)) == minutes


@pytest.mark.parametrize(
    ("state", "block_all", "expected"),
    [
        ("Firewall is disabled. (State = 0)", "", "off"),
        ("Firewall is enabled. (State = 1)", "Block all DISABLED!", "on"),
        ("Firewall is enabled. (State = 1)", "Firewall has block all state set to disabled.", "on"),
        ("Firewall is enabled. (State = 2)", "Block all ENABLED!", "blocks all"),
    ],
)
def test_a_macs_firewall_is_off_on_or_blocks_all(state: str, block_all: str, expected: str) -> None:
    assert probe.firewall(state, block_all) == expected
