"""The NVIDIA sampler over a stand-in driver with known values: units, directions, and sensors that are missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "nvml_shim.c"
SCRIPT = """
import json, threading, time
import pynvml
from profiling.samplers import NvidiaSampler
from workbench.runs import gpus
sampler = NvidiaSampler(pcie_period=0.05)
real, threads = pynvml.nvmlDeviceGetPcieThroughput, set()
def seen(*arguments):
    threads.add(threading.get_ident())
    return real(*arguments)
pynvml.nvmlDeviceGetPcieThroughput = seen
while not threads or len(sampler.read()) < 19:
    time.sleep(0.01)
readings, waits = sampler.read(), threading.get_ident() in threads
out = {"readings": readings, "missing": sampler.missing, "waits": waits, "facts": sampler.facts(), "gpus": gpus()}
sampler.close()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in needs a C compiler and Linux")
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    variables = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_sensor_is_read_in_its_unit(seen: dict[str, Any]) -> None:
    assert {metric: value for metric, device, value in seen["readings"] if device == "0"} == {
        "gpu.busy": 70,
        "gpu.memory_busy": 30,
        "gpu.memory_used": 2 << 30,
        "gpu.power": 250.5,
        "gpu.sm_clock": 2400,
        "gpu.memory_clock": 14000,
        "gpu.temperature": 61,
        "pcie.generation": 5,
        "pcie.width": 16,
        "pcie.sent": 1000 * 1024,
        "pcie.received": 2000 * 1024,
    }


def test_what_a_card_lacks_is_named_and_not_read_as_zero(seen: dict[str, Any]) -> None:
    lacks = {"gpu.power", "pcie.sent", "pcie.received"}
    assert seen["missing"] == {f"{metric} of card 1": "Not Supported" for metric in lacks}
    assert not {metric for metric, device, _ in seen["readings"] if device == "1"} & lacks


def test_reading_does_not_wait_for_the_pcie_counters(seen: dict[str, Any]) -> None:
    assert not seen["waits"]  # a thread of its own does


def test_cards_are_named_with_their_memory(seen: dict[str, Any]) -> None:
    assert [card["memory_bytes"] >> 30 for card in seen["facts"]["gpus"]] == [32, 96]
    assert [(card["name"], card["uuid"], card["memory_mib"]) for card in seen["gpus"]] == [
        ("NVIDIA GeForce RTX 5090", "GPU-0", 32768),
        ("NVIDIA RTX PRO 6000", "GPU-1", 98304),
    ]
