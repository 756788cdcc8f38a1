"""The table of rules: each sees its own fault on a made trace, and none sees one on a trace that is well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from profiling.rules import RULES, findings
from profiling.shares import card_shares, link_bytes, per_unit
from profiling.trace import HostTrace, Mark, Phase, Recording

GIB = 2.0**30
SECONDS = 100
START = 1_000_000.0
Values = dict[tuple[str, str], Any]

WELL: Values = {
    ("cpu.busy", ""): 40,
    ("cpu.io_wait", ""): 1,
    ("cpu.core_busy", "0"): 60,
    ("cpu.core_busy", "1"): 20,
    ("memory.used", ""): 8 * GIB,
    ("swap.used", ""): 0,
    ("object_store.spilled_bytes", ""): 0,
    ("gpu.busy", "0"): 95,
    ("gpu.busy", "1"): 92,
    ("gpu.memory_busy", "0"): 50,
    ("gpu.memory_used", "0"): 20 * GIB,
    ("gpu.memory_used", "1"): 20 * GIB,
    ("gpu.process_memory", "0/77"): 19 * GIB,
    ("gpu.throttle_reasons", "0"): 0,
    ("gpu.throttle_reasons", "1"): 0,
    ("gpu.temperature", "0"): 65,
    ("gpu.power", "0"): 400,
    ("pcie.width", "0"): 16,
    ("pcie.width", "1"): 16,
    ("pcie.generation", "0"): 5,
    ("pcie.generation", "1"): 5,
    ("pcie.received", "0"): 1e9,
    ("pcie.sent", "0"): 1e8,
    ("process.cpu", "77"): 55,
    ("process.cpu", "78"): 5,
}
CARD = {"name": "RTX", "memory_bytes": 32 * GIB, "pcie_width_max": 16, "pcie_generation_max": 5, "power_limit": 600}
FACTS = {
    "cores": 2, "memory_bytes": 64 * GIB, "hertz": 1.0, "gpus": [CARD, CARD], "missing": {"nvlink": "Not Supported"},
    "sampler_cpu_seconds": 0.5, "sampler_wall_seconds": 100.0, "processes": {"77": {"runs": "Loader", "job": "01"}},
}  # fmt: skip


def half(first: float, second: float) -> np.ndarray:
    return np.repeat([first, second], SECONDS // 2).astype(float)


def trace_of(
    values: Values, facts: dict[str, Any] | None = None, host: str = "box", seconds: int = SECONDS
) -> HostTrace:
    times = START + np.arange(seconds, dtype=float)
    series = {
        key: (times, np.broadcast_to(np.asarray(value, float), (SECONDS,))[:seconds]) for key, value in values.items()
    }
    return HostTrace(host, {**FACTS, **(facts or {})}, series)


def seen(values: Values, facts: dict[str, Any] | None = None) -> dict[str, tuple[str, str]]:
    recording = Recording({"box": trace_of({**WELL, **values}, facts)})
    return {one.rule: (one.says, one.evidence) for one in reversed(findings(recording))}  # the first of each


def test_a_trace_that_is_well_has_no_findings() -> None:
    assert seen({}) == {}


IDLE = half(0, 95)
BOTH_IDLE: Values = {("gpu.busy", "0"): IDLE, ("gpu.busy", "1"): IDLE}

FAULTS: dict[str, tuple[Values, dict[str, Any], str, str]] = {
    "narrow link": ({("pcie.width", "1"): 4}, {}, "PCIe link of card 1 runs at x4 of x16", "15.8 GB/s"),
    "slow link": ({("pcie.generation", "0"): 3}, {}, "stays at generation 3 of 5 under load", "100 samples"),
    "link full": ({("pcie.received", "0"): half(1e9, 60e9)}, {}, "to card 0 fills its link 50%", "63.0 GB/s"),
    "waits for cores": (
        {**BOTH_IDLE, ("cpu.core_busy", "0"): half(99, 20)}, {},
        "GPU 0 idle 50% of the time while the data loader's cores are full", "Loader 77, job 01, 55% of a core",
    ),
    "waits for disk": (
        {**BOTH_IDLE, ("cpu.io_wait", ""): half(60, 0)}, {}, "idle 50% of the time while the disk is read", "in all"
    ),
    "held and idle": (BOTH_IDLE, {}, "while a job holds it", "held by Loader 77, job 01"),
    "power cap": ({("gpu.throttle_reasons", "0"): half(4, 0)}, {}, "power cap reached 50% of the time", "600 W"),
    "too hot": ({("gpu.throttle_reasons", "0"): half(0x40, 0)}, {}, "throttled by heat 50%", "65 degrees"),
    "slowed down": ({("gpu.throttle_reasons", "1"): half(8, 0)}, {}, "GPU 1 slowed down by its", "no heat"),
    "card memory full": ({("gpu.memory_used", "1"): 31.9 * GIB}, {}, "GPU 1: memory nearly full", "31.9 of 32.0 GiB"),
    "uneven cards": ({("gpu.busy", "1"): 30}, {}, "GPU 1 works less than GPU 0", "30% busy beside 95%"),
    "memory full": ({("swap.used", ""): half(0, GIB)}, {}, "began to swap", "1.0 GiB more"),
    "spilled": ({("object_store.spilled_bytes", ""): half(0, 2 * GIB)}, {}, "spilled to disk", "2.00 GiB"),
    "sensor failed": (
        {}, {"missing": {"gpu.power of card 0": "GPU is lost, in the middle of the recording"}},
        "gpu.power of card 0 failed", "GPU is lost",
    ),
    "clock set": ({}, {"clock_steps": [{"time": START + 30, "seconds": -7.5}]}, "set by -7.5 s", "30 s after"),
    "damaged part": ({}, {"damaged_parts": ["part-7.parquet: no footer"]}, "1 of the host's files", "part-7.parquet"),
    "sampler cost": ({}, {"sampler_cpu_seconds": 9.0}, "sampling took 9.0% of a core", "1 Hz"),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_sees_its_fault_and_no_other_does(rule: str) -> None:
    values, facts, says, evidence = FAULTS[rule]
    found = seen(values, facts)
    assert list(found) == [rule]
    assert says in found[rule][0] and evidence in found[rule][1]


def test_a_link_that_was_narrow_for_a_part_of_the_time_is_seen() -> None:
    says, evidence = seen({("pcie.width", "1"): np.repeat([16, 4], [60, 40])})["narrow link"]
    assert "x4 of x16" in says and "x4 in 40% of 100 samples" in evidence


def test_a_card_idles_for_the_cores_only_while_they_are_full() -> None:
    values: Values = {("gpu.busy", "0"): 0, ("gpu.busy", "1"): 0, ("cpu.core_busy", "0"): np.repeat([99, 20], [21, 79])}
    says, evidence = seen(values)["waits for cores"]
    assert says.startswith("GPU 0 idle 21% of the time while") and evidence.startswith("idle 100% in all")


def recording_of(change: Callable[[HostTrace], None]) -> Recording:
    recording = Recording({"box": trace_of(WELL), "other": trace_of(WELL, host="other")})
    change(recording.hosts["other"])
    return recording


def test_a_host_that_died_is_seen_by_the_end_of_its_samples() -> None:
    recording = recording_of(lambda trace: None)
    recording.hosts["other"] = trace_of(WELL, host="other", seconds=40)
    [found] = findings(recording)
    assert (found.rule, found.host) == ("host ended", "other")
    assert found.evidence.startswith("60 s before")


def test_a_gap_in_the_samples_is_seen() -> None:
    def stop(trace: HostTrace) -> None:
        keep = np.r_[0:30, 60:SECONDS]
        trace.series = {key: (times[keep], values[keep]) for key, (times, values) in trace.series.items()}

    [found] = findings(recording_of(stop))
    assert (found.rule, found.says) == ("host stood still", "no sample for 31 s")


def test_a_clock_that_differs_is_seen() -> None:
    recording = recording_of(lambda trace: None)
    recording.offsets, recording.clock_error = {"box": 0.0, "other": 90.0}, 0.002
    [found] = findings(recording)
    assert (found.rule, found.host, found.says) == (
        "clock apart", "other", "the clock differs by +90.0 s from the other hosts'"
    )  # fmt: skip


def test_full_cores_are_seen_where_there_is_no_card() -> None:
    values = {key: value for key, value in WELL.items() if not key[0].startswith(("gpu.", "pcie."))}
    recording = Recording({"box": trace_of({**values, ("cpu.busy", ""): half(95, 99)}, {"gpus": []})})
    assert [one.says for one in findings(recording)] == ["all cores full 100% of the time"]


def test_every_rule_has_a_test() -> None:
    elsewhere = {"host ended", "host stood still", "clock apart", "cores full"}
    assert FAULTS.keys() | elsewhere == RULES.keys()


def test_a_sensor_that_is_missing_makes_no_finding_and_no_zero() -> None:
    values = {key: value for key, value in WELL.items() if key[0] not in ("gpu.throttle_reasons", "cpu.core_busy")}
    trace = trace_of(values)
    assert findings(Recording({"box": trace})) == []
    shares = card_shares(trace, "0", *trace.span)
    assert shares["idle"] == 0 and shares["power_capped"] is None and shares["waits_for_cores"] is None


def test_idle_is_split_by_what_the_host_did_meanwhile() -> None:
    values: Values = {
        ("gpu.busy", "0"): np.repeat([0, 0, 0, 90], 25),
        ("cpu.core_busy", "0"): np.repeat([99, 20, 20, 99], 25),
        ("cpu.io_wait", ""): np.repeat([0, 50, 0, 50], 25),
    }
    trace = trace_of({**WELL, **values})
    shares = card_shares(trace, "0", *trace.span)
    assert [shares[key] for key in ("idle", "waits_for_cores", "waits_for_disk", "waits_for_else")] == [75, 25, 25, 25]


def test_the_link_is_the_one_that_the_card_has() -> None:
    assert [round(link_bytes(*link) / 1e9, 1) for link in ((5, 16), (5, 8), (4, 16), (3, 16), (1, 4))] == [
        63.0, 31.5, 31.5, 15.8, 1.0
    ]  # fmt: skip


def test_bytes_and_joules_by_unit_of_marks_and_phases() -> None:
    recording = Recording({"box": trace_of(WELL)})
    recording.marks = [Mark("step", n, START + 10 * n, "box", 5, {"tokens": 2000}) for n in range(5)]
    recording.phases = [Phase("embed", START, START + 20, "box", 6, {"documents": 100})]
    rows = {row["unit"]: row for row in per_unit(recording)}
    assert (rows["step"]["count"], rows["step"]["seconds"]) == (4, 10)
    assert rows["step"]["joules"] == pytest.approx(4000)  # 400 W for 10 s
    assert rows["token"]["joules"] == pytest.approx(2.0)
    assert rows["step"]["pcie_bytes"] == pytest.approx(1.1e10)
    assert rows["document"]["joules"] == pytest.approx(80)
    assert rows["document"]["disk_bytes"] is None


def test_marks_without_a_number_are_one_series_over_their_processes() -> None:
    recording = Recording({"box": trace_of(WELL)})
    recording.marks = [
        Mark("batch", "", START + 10 * n, "box", worker, {"documents": 50}) for n in range(5) for worker in (5, 6)
    ] + [Mark("said", "hello", START, "box", 5), Mark("said", "bye", START + 9, "box", 5)]
    batch, document = per_unit(recording)
    assert (batch["of"], batch["count"], document["count"]) == ("batchs of 2 processes", 9, 450)
    assert document["joules"] == pytest.approx(40 * 400 / 450)


def test_a_phase_that_began_before_the_recording_has_no_bytes_and_joules_by_unit() -> None:
    recording = Recording({"box": trace_of(WELL)})
    recording.phases = [Phase("embed", START - 900, START + 20, "box", 6, {"documents": 100})]
    assert per_unit(recording) == []


def test_network_bytes_are_those_that_leave_the_host() -> None:
    values: Values = {("network.sent_bytes", name): np.linspace(0, 1e9, 100) for name in ("eth0", "lo", "docker0")}
    recording = Recording({"box": trace_of({**WELL, **values})})
    recording.phases = [Phase("send", *recording.span, "box", 6, {"tokens": 1000})]
    assert per_unit(recording)[0]["network_bytes"] == pytest.approx(1e6)
