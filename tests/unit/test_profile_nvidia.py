"""The NVIDIA sampler over a stand-in driver whose cards a script changes: what was put in must come out."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from card_sensors import unaccounted
from lab.cards import RTX_5090, RTX_PRO_6000, Card, library, write_cards

from profiling import nvidia
from profiling.rules import findings
from profiling.shares import per_unit
from profiling.trace import Recording, read_recording

READ = """
import json, threading, time
import pynvml
from profiling.nvidia import NvidiaSampler
from workbench.runs import gpus
sampler = NvidiaSampler(pcie_period=0.05)
real, threads = pynvml.nvmlDeviceGetPcieThroughput, set()
def seen(*arguments):
    threads.add(threading.get_ident())
    return real(*arguments)
pynvml.nvmlDeviceGetPcieThroughput = seen
traffic = []
while len(traffic) < 2:
    traffic += [one for one in sampler.read() if one.metric.startswith("pcie.")]
    time.sleep(0.01)
time.sleep(0.3)
readings = sampler.read() + sampler.read_slowly()
print(json.dumps({"readings": readings, "missing": sampler.missing, "waits": threading.get_ident() in threads,
                  "facts": sampler.facts(), "gpus": gpus()}))
sampler.close()
"""

RECORD = """
import sys, time
from profiling import mark, phase
from profiling.recorder import HostRecorder
recorder = HostRecorder(sys.argv[1], hertz=20)
recorder.ready()
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("step"):
        mark("step", int(line.split()[1]), tokens=1000)
    else:
        break
recorder.stop()
"""

SPENT = dataclasses.replace(
    RTX_PRO_6000, utilization=90, power=None, pcie_sent=None, pcie_received=None, energy=None, pcie_width=8
)
BUSY = dataclasses.replace(
    RTX_5090, utilization=70, memory_utilization=30, memory_used=2 << 30, power=250_500, sm_clock=2400,
    memory_clock=14_000, temperature=61, pcie_sent=1000, pcie_received=2000, energy=5_000_000, throttle_reasons=4,
    processes=((4242, 1 << 30),),
)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in needs a C compiler and Linux")
    folder = tmp_path_factory.mktemp("driver")
    return {**os.environ, "LD_LIBRARY_PATH": str(library(folder).parent), "NVML_STUB_CARDS": str(folder / "cards")}


@pytest.fixture(scope="module")
def seen(driver: dict[str, str]) -> dict[str, Any]:
    write_cards(Path(driver["NVML_STUB_CARDS"]), [BUSY, SPENT])
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=driver)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_sensor_is_read_in_its_unit(seen: dict[str, Any]) -> None:
    assert {metric: value for metric, device, value in seen["readings"] if device == "0"} == {
        "gpu.busy": 70,
        "gpu.memory_busy": 30,
        "gpu.memory_used": 2 << 30,
        "gpu.power": 250.5,
        "gpu.energy_joules": 5000,
        "gpu.sm_clock": 2400,
        "gpu.memory_clock": 14000,
        "gpu.throttle_reasons": 4,
        "gpu.temperature": 61,
        "gpu.encoder": 0,
        "gpu.decoder": 0,
        "pcie.generation": 5,
        "pcie.width": 16,
        "pcie.sent": 1000 * 1024,
        "pcie.received": 2000 * 1024,
    }
    assert ["gpu.process_memory", "0/4242", 1 << 30] in seen["readings"]


def test_what_a_card_lacks_is_named_and_not_read_as_zero(seen: dict[str, Any]) -> None:
    lacks = {"gpu.power", "gpu.energy_joules", "pcie.sent", "pcie.received"}
    missing = {name for name, why in seen["missing"].items() if why == "Not Supported"}
    assert missing == {f"{metric} of card 1" for metric in lacks}
    assert not {metric for metric, device, _ in seen["readings"] if device == "1"} & lacks
    assert {name for name in seen["missing"] if name.startswith("nvlink.sent")} == {
        "nvlink.sent_bytes of card 0",
        "nvlink.sent_bytes of card 1",
    }


def test_each_card_reads_or_names_every_sensor(seen: dict[str, Any]) -> None:
    read = {(metric, device) for metric, device, _ in seen["readings"]}
    assert not unaccounted(read, seen["missing"], cards=2)
    assert unaccounted(read - {("gpu.temperature", "0")}, seen["missing"], cards=2) == ["gpu.temperature of card 0"]


def test_reading_does_not_wait_for_the_pcie_counters(seen: dict[str, Any]) -> None:
    assert not seen["waits"]  # a thread of its own does
    assert seen["facts"]["pcie_hertz"] > 1


def test_cards_are_named_with_their_memory_and_limits(seen: dict[str, Any]) -> None:
    assert [card["memory_bytes"] >> 20 for card in seen["facts"]["gpus"]] == [32_607, 97_887]
    assert [card["pcie_width_max"] for card in seen["facts"]["gpus"]] == [16, 16]
    assert seen["facts"]["gpus"][0]["power_limit"] == 600
    assert [card["name"] for card in seen["gpus"]] == [RTX_5090.name, RTX_PRO_6000.name]


class Load:
    """A recording of this host in a process of its own, with cards that the test changes meanwhile."""

    def __init__(self, driver: dict[str, str], folder: Path, cards: list[Card]) -> None:
        self.folder, self._cards = folder, Path(driver["NVML_STUB_CARDS"])
        write_cards(self._cards, cards)
        command = [sys.executable, "-c", RECORD, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=driver, cwd=Path.cwd()
        )
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def hold(self, cards: list[Card], seconds: float) -> tuple[float, float]:
        """Let the cards be so for a while; from when to when they surely were."""
        write_cards(self._cards, cards)
        start = time.time() + 0.2
        time.sleep(seconds)
        return start, time.time() - 0.05

    def step(self, number: int) -> None:
        self._tell(f"step {number}\n")

    def end(self) -> Recording:
        self._tell("end\n")
        assert self._process.wait(30) == 0
        return read_recording(self.folder)

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line)
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def recorded(driver: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Any, Any]:
    """Card 0 idle, then at work with energy counted; card 1 at x8, and its driver's temperature lost in the middle."""
    idle = dataclasses.replace(BUSY, utilization=0, pcie_sent=0, pcie_received=0, throttle_reasons=1)
    load = Load(driver, tmp_path_factory.mktemp("samples"), [idle, SPENT])
    first = load.hold([idle, SPENT], 1.5)
    load.step(1)
    load.hold([idle, SPENT], 0.3)
    second = load.hold([dataclasses.replace(BUSY, energy=5_300_000), dataclasses.replace(SPENT, temperature=None)], 2.5)
    load.step(2)
    return load.end(), first, second


def test_a_scripted_load_comes_out_of_the_recording(recorded: tuple[Recording, Any, Any]) -> None:
    recording, first, second = recorded
    [trace] = recording.hosts.values()
    assert set(trace.values("gpu.busy", "0", *first)) == {0}
    assert set(trace.values("gpu.busy", "0", *second)) == {70}
    received = trace.integral("pcie.received", *second)
    assert received == pytest.approx(2000 * 1024 * (second[1] - second[0]), rel=0.1)
    assert trace.total("gpu.energy_joules", *trace.span, ["0"]) == 300
    assert trace.joules(*trace.span, "1") is None


def test_bytes_and_joules_of_a_step_are_those_between_its_marks(recorded: tuple[Recording, Any, Any]) -> None:
    recording, _, _ = recorded
    step, token = per_unit(recording)
    assert (step["unit"], step["count"], token["unit"], token["count"]) == ("step", 1, "token", 1000)
    assert step["joules"] == pytest.approx(300)
    assert token["joules"] == pytest.approx(step["joules"] / 1000)
    assert step["pcie_bytes"] == pytest.approx(3000 * 1024 * step["seconds"], rel=0.3)


def test_the_faults_that_were_planted_are_found(recorded: tuple[Recording, Any, Any]) -> None:
    recording, _, _ = recorded
    said = {one.rule: one.says for one in findings(recording)}
    assert said["narrow link"] == "PCIe link of card 1 runs at x8 of x16"
    assert said["sensor failed"] == "gpu.temperature of card 1 failed in the middle of the recording"
    assert "power cap reached" in said["power cap"]


def test_the_lanes_of_a_card_are_those_that_it_has_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "PCI_DEVICES", tmp_path)
    nvml = SimpleNamespace(
        nvmlDeviceGetPciInfo=lambda handle: SimpleNamespace(busId="00000000:C1:00.0"),
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 4,  # the slot's
    )
    assert nvidia.card_width(nvml, None) == 4  # no Linux, or a container without /sys
    device = tmp_path / "0000:c1:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    for told, width in {"16": 16, "255": 4, "x": 4}.items():
        (device / "max_link_width").write_text(told + "\n")
        assert nvidia.card_width(nvml, None) == width
    (device / "max_link_width").write_text("16\n")
    (device / "vendor").write_text("0x1af4\n")
    assert nvidia.card_width(nvml, None) == 4
