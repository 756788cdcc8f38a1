"""The GPU of a Mac, by answers of ioreg and of the library that reads its energy; neither has been asked on a Mac."""

import plistlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from profiling.apple import AppleSampler

ANSWER = plistlib.dumps([{"PerformanceStatistics": {"Device Utilization %": 37, "In use system memory": 5 << 20}}])


class Monitor:
    """As AppleEnergyMonitor of zeus_apple_silicon; ``told`` in millijoules, None where the chip has no counter."""

    told: list[int | None]

    def get_cumulative_energy(self) -> Any:
        if not self.told:
            raise RuntimeError("the counters are gone")
        return SimpleNamespace(gpu_mj=self.told.pop(0))


def sampler(monkeypatch: pytest.MonkeyPatch, told: list[int | None] | None) -> AppleSampler:
    """A sampler on what looks like a Mac, one reading a second; without the library where nothing is told."""
    clock = iter(range(100))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("profiling.apple.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(
        "profiling.apple.subprocess",
        SimpleNamespace(
            run=lambda *_, **__: SimpleNamespace(stdout=ANSWER), SubprocessError=subprocess.SubprocessError
        ),
    )
    module = None if told is None else SimpleNamespace(AppleEnergyMonitor=type("M", (Monitor,), {"told": list(told)}))
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    return AppleSampler()


def test_utilisation_memory_energy_and_power_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler(monkeypatch, [1000, 1000, 4500])
    assert made.missing == {}
    assert {r.metric: r.value for r in made.read_slowly()} == {
        "gpu.busy": 37, "gpu.memory_used": 5 << 20, "gpu.energy_joules": 4.5, "gpu.power": 3.5,
    }  # fmt: skip


@pytest.mark.parametrize("told", [None, [None], []], ids=["no library", "no counter", "no chip it knows"])
def test_energy_that_is_not_to_be_had_is_missing_and_no_zero(
    monkeypatch: pytest.MonkeyPatch, told: list[int | None] | None
) -> None:
    made = sampler(monkeypatch, told)
    assert set(made.missing) == {"gpu.power of card 0", "gpu.energy_joules of card 0"}
    assert {r.metric for r in made.read_slowly()} == {"gpu.busy", "gpu.memory_used"}


def test_a_counter_that_fails_in_the_middle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler(monkeypatch, [1000, 1000])
    assert made.missing == {}
    assert {r.metric for r in made.read_slowly()} == {"gpu.busy", "gpu.memory_used"}
    assert "the counters are gone" in made.missing["gpu.power of card 0"]


def test_elsewhere_there_is_nothing_and_nothing_is_missing() -> None:
    made = AppleSampler()
    assert (made.read(), made.read_slowly(), made.missing) == ([], [], {})
