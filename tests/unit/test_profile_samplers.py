"""Samplers on this very host: what they read is there, and what is missing has a name."""

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest

from profiling.nvidia import NvidiaSampler
from profiling.recorder import HostRecorder, write_part
from profiling.samplers import UNITS, HostSampler, Reading, is_whole_disk
from profiling.trace import read_recording
from workbench.errors import Failure


def test_every_reading_is_a_metric_with_a_unit() -> None:
    sampler = HostSampler()
    readings = sampler.read() + sampler.read_slowly()
    assert {reading.metric for reading in readings} <= UNITS.keys()
    assert {"cpu.busy", "memory.used", "network.sent_bytes"} <= {reading.metric for reading in readings}


def test_each_core_and_the_memory_are_this_hosts() -> None:
    sampler = HostSampler()
    readings = sampler.read()
    assert sum(reading.metric == "cpu.core_busy" for reading in readings) == psutil.cpu_count()
    [used] = [reading.value for reading in readings if reading.metric == "memory.used"]
    assert 0 < used < psutil.virtual_memory().total == sampler.facts()["memory_bytes"]


def test_a_busy_core_shows(tmp_path: Path) -> None:
    sampler = HostSampler()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    cores = [reading.value for reading in sampler.read() if reading.metric == "cpu.core_busy"]
    assert max(cores) > 20


@pytest.mark.parametrize("name", ["loop0", "zram0", "dm-0", "md0", "nonesuch1"])
def test_a_device_that_counts_bytes_a_second_time_is_no_disk(name: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems list whole disks only")
    assert not is_whole_disk(name)


def test_a_host_without_a_card_says_so_and_reads_no_zero() -> None:
    sampler = NvidiaSampler()
    if "gpu" not in sampler.missing:
        pytest.skip("this host has a card")
    assert "NVML" in sampler.missing["gpu"]
    assert sampler.read() == sampler.read_slowly() == []
    assert sampler.facts() == {"gpus": []}
    sampler.close()


def test_a_recorder_writes_what_it_sampled_and_what_it_cost(tmp_path: Path) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    time.sleep(1)
    recorder.stop()
    [trace] = read_recording(tmp_path).hosts.values()
    assert trace.host == recorder.host
    assert len(trace.series["cpu.busy", ""][0]) == trace.facts["samples"] >= 5
    assert 0 < trace.facts["sampler_cpu_seconds"] < trace.facts["sampler_wall_seconds"]


def test_a_host_that_does_not_see_the_storage_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="storage that all hosts share"):
        HostRecorder(str(tmp_path / "elsewhere"))


def test_a_recorder_that_says_it_is_ready_has_its_first_sample(tmp_path: Path) -> None:
    """So what counts its seconds from then on gets them all, also where the machine is slow to start."""
    recorder = HostRecorder(str(tmp_path), hertz=0.1)
    ready = recorder.ready()
    recorder.stop()
    [trace] = read_recording(tmp_path).hosts.values()
    assert ready == recorder.host and trace.facts["samples"] == 1


def test_a_sampler_that_fails_in_the_middle_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()

    def lost(self: NvidiaSampler) -> list[Reading]:
        raise RuntimeError("fell off the bus")

    monkeypatch.setattr(NvidiaSampler, "read", lost)
    time.sleep(0.5)
    recorder.stop()
    [trace] = read_recording(tmp_path).hosts.values()
    assert "fell off the bus" in trace.facts["missing"]["NvidiaSampler"]
    assert "in the middle" in trace.facts["missing"]["NvidiaSampler"]
    assert trace.facts["samples"] >= 5


def test_samples_wait_for_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiling.recorder.PART_SECONDS", 0.1)
    real = write_part
    away = [True]

    def part(*arguments: Any) -> Path:
        if away[0]:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr("profiling.recorder.write_part", part)
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()
    time.sleep(0.5)
    away[0] = False
    recorder.stop()
    [trace] = read_recording(tmp_path).hosts.values()
    assert len(trace.series["cpu.busy", ""][0]) == trace.facts["samples"] >= 5


def test_a_card_that_does_not_answer_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    for name in [name for name in dir(pynvml) if name.startswith("nvmlDevice")]:
        monkeypatch.setattr(pynvml, name, lost)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index or lost())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "RTX")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda *_: 40)
    sampler = NvidiaSampler()
    assert sampler.read_slowly() == [Reading("gpu.temperature", "1", 40.0)]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lost)
    assert [card["name"] for card in sampler.facts()["gpus"]] == ["unknown", "RTX"]
    assert "card 0" in sampler.missing
    sampler.close()
