"""The NVIDIA sampler on a real card: work, memory and PCIe traffic show; what the card lacks is named."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from card_sensors import unaccounted

from profiling.nvidia import NvidiaSampler
from profiling.recorder import HostRecorder
from profiling.timeline import timeline_figure
from profiling.trace import HostTrace, read_recording

GIB = 2**30


@pytest.fixture(autouse=True)
def _card() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA card, or a PyTorch without CUDA")


@pytest.fixture
def sampler() -> Iterator[NvidiaSampler]:
    sampler = NvidiaSampler(pcie_period=0.1)
    yield sampler
    sampler.close()


def test_each_card_reads_or_names_every_sensor(sampler: NvidiaSampler) -> None:
    time.sleep(1)
    cards = len(sampler.facts()["gpus"])
    assert cards
    read = {(reading.metric, reading.device) for reading in sampler.read() + sampler.read_slowly()}
    assert not unaccounted(read, sampler.missing, cards)


def load(folder: Path, seconds: float) -> HostTrace:
    """Record while matrices are copied to the card and multiplied there."""
    import torch

    host = torch.empty(GIB // 4, dtype=torch.float32, pin_memory=True)
    recorder = HostRecorder(str(folder), hertz=10)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        square = host.to("cuda", non_blocking=True)[: 8192 * 8192].view(8192, 8192)
        for _ in range(10):
            square = square @ square
        torch.cuda.synchronize()
    recorder.stop()
    [trace] = read_recording(folder).hosts.values()
    return trace


def test_work_memory_and_traffic_show(tmp_path: Path) -> None:
    trace = load(tmp_path, 6)
    busy = trace.series["gpu.busy", "0"][1]
    assert busy.max() > 50
    assert trace.series["gpu.memory_used", "0"][1].max() > GIB
    if ("pcie.received", "0") in trace.series:
        assert trace.series["pcie.received", "0"][1].max() > 1e8
    else:
        assert "pcie.received of card 0" in trace.facts["missing"]
    titles = {axis.title.text for axis in timeline_figure(trace, []).select_yaxes()}
    assert {"GPU %", "GPU memory GiB"} <= titles
