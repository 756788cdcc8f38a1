"""Recordings: the bytes and loads that went in come out, for any interval."""

import json
from pathlib import Path

import numpy as np
import pytest

from profiling.page import summarize
from profiling.recorder import write_part
from profiling.samplers import Reading
from profiling.shares import interfaces
from profiling.timeline import phase_table, timeline_figure
from profiling.trace import HostTrace, Phase, read_phases, read_recording
from workbench.errors import UserError
from workbench.files import write_json

GIB = 2**30
START = 1_000_000.0


def made_trace(folder: Path, seconds: int = 20) -> Path:
    """One host, a sample a second: CPU 10% and then 90% from second 10 on, one GiB read each second from second 10 on,
    a tenth of a GiB sent each second on eth0 and another on the loopback; in two parts."""
    samples = []
    for t in range(seconds + 1):
        now = START + t
        samples += [
            (now, Reading("cpu.busy", "", 90.0 if t >= 10 else 10.0)),
            (now, Reading("memory.used", "", (1 + t) * GIB)),
            (now, Reading("disk.read_bytes", "sda", 5e9 + max(0, t - 10) * GIB)),
            (now, Reading("disk.written_bytes", "sda", 7e9)),
            (now, Reading("network.sent_bytes", "eth0", 1e6 + t * GIB / 10)),
            (now, Reading("network.sent_bytes", "lo", t * GIB / 10)),
            (now, Reading("network.sent_bytes", "docker0", t * GIB)),
            (now, Reading("network.received_bytes", "eth0", 3.0)),
        ]
    half = len(samples) // 2
    write_part(folder / "box", samples[:half])
    write_part(folder / "box", samples[half:])
    facts = {"host": "box", "cores": 4, "memory_bytes": 64 * GIB, "gpus": [], "hertz": 1.0, "missing": {"gpu": "none"}}
    write_json(folder / "box" / "host.json", {**facts, "sampler_cpu_seconds": 0.1, "sampler_wall_seconds": 20.0})
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> HostTrace:
    return read_recording(made_trace(tmp_path)).hosts["box"]


def test_bytes_of_an_interval_are_the_rise_of_the_counter(trace: HostTrace) -> None:
    assert trace.total("disk.read_bytes", START, START + 10) == 0
    assert trace.total("disk.read_bytes", START + 10, START + 20) == pytest.approx(10 * GIB)
    assert trace.total("disk.read_bytes", START + 12.25, START + 13.75) == pytest.approx(1.5 * GIB)


def test_nothing_is_added_outside_the_recording(trace: HostTrace) -> None:
    assert trace.total("disk.read_bytes", START - 100, START + 1000) == pytest.approx(10 * GIB)


def test_rates_integrate_to_the_bytes(trace: HostTrace) -> None:
    series = trace.rate("disk.read_bytes")
    assert series is not None
    times, rates = series
    assert len(times) == 20
    assert np.sum(rates * 1.0) == pytest.approx(10 * GIB)
    assert rates[:10].max() == 0


def test_a_damaged_part_costs_its_own_samples_only(tmp_path: Path) -> None:
    folder = made_trace(tmp_path)
    (folder / "box" / "part-7.parquet").write_bytes(b"PAR1 cut off")
    trace = read_recording(folder).hosts["box"]
    assert trace.total("disk.read_bytes", START, START + 20) == pytest.approx(10 * GIB)
    [damaged] = trace.facts["damaged_parts"]
    assert damaged.startswith("part-7.parquet: ")


def test_devices_are_in_the_order_of_their_numbers() -> None:
    series = {("gpu.busy", card): (np.zeros(1), np.zeros(1)) for card in ("10", "9", "0")}
    series |= {("disk.read_bytes", disk): (np.zeros(1), np.zeros(1)) for disk in ("sda", "nvme10n1", "nvme2n1")}
    trace = HostTrace("box", {}, series)
    assert trace.cards == ["0", "9", "10"]
    assert trace.devices("disk.read_bytes") == ["nvme2n1", "nvme10n1", "sda"]


def test_energy_after_the_counter_failed_is_that_of_the_power() -> None:
    seconds = np.arange(21.0)
    trace = HostTrace("box", {}, {
        ("gpu.energy_joules", "0"): (seconds[:11], 50 * seconds[:11]), ("gpu.power", "0"): (seconds, np.full(21, 70.0)),
    })  # fmt: skip
    assert trace.joules(0, 20, "0") == pytest.approx(500 + 700)
    assert trace.joules(2, 8, "0") == pytest.approx(300)
    assert trace.joules(12, 15, "0") == pytest.approx(210)
    del trace.series["gpu.power", "0"]
    assert trace.joules(0, 20, "0") == pytest.approx(500)


def test_a_lost_part_loses_no_bytes(tmp_path: Path) -> None:
    folder = made_trace(tmp_path)
    samples = [(START + t, Reading("disk.read_bytes", "sda", 5e9 + (t - 10) * GIB)) for t in (100, 101)]
    write_part(folder / "box", samples)
    trace = read_recording(folder).hosts["box"]
    assert trace.total("disk.read_bytes", START, START + 101) == pytest.approx(91 * GIB)


def test_a_counter_that_starts_anew_after_a_restart_counts_from_zero() -> None:
    series = (np.array([0.0, 1.0, 2.0]), np.array([500.0, 600.0, 50.0]))
    assert HostTrace("box", {}, {("disk.read_bytes", "sda"): series}).total("disk.read_bytes", 0, 2) == 150


def test_a_device_that_appears_later_adds_only_what_it_moved() -> None:
    series = {
        ("disk.read_bytes", "sda"): (np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 3.0])),
        ("disk.read_bytes", "usb"): (np.array([2.0, 3.0]), np.array([1e12, 1e12 + 10])),
    }
    trace = HostTrace("box", {}, series)
    assert trace.total("disk.read_bytes", 0, 3) == 13
    rate = trace.rate("disk.read_bytes")
    assert rate is not None and rate[1].tolist() == [1.0, 1.0, 11.0]


def test_a_sensor_that_is_missing_is_none_and_not_zero(trace: HostTrace) -> None:
    assert trace.total("pcie.sent", START, START + 20) is None
    assert trace.rate("pcie.sent") is None


def test_the_phase_table_holds_each_phases_own_figures(trace: HostTrace) -> None:
    idle, load = phase_table(trace, [Phase("idle", START, START + 9), Phase("load", START + 10, START + 20)])
    assert (idle["phase"], idle["seconds"], idle["cpu_mean_percent"], idle["disk_read_gib"]) == ("idle", 9.0, 10.0, 0.0)
    assert (load["cpu_mean_percent"], load["cpu_peak_percent"], load["memory_peak_gib"]) == (90.0, 90.0, 21.0)
    assert (load["disk_read_gib"], load["disk_written_gib"]) == (10.0, 0.0)
    assert (load["network_sent_gib"], load["loopback_gib"]) == (1.0, 1.0)


def test_a_phase_that_was_not_sampled_has_no_figures(trace: HostTrace) -> None:
    [row] = phase_table(trace, [Phase("later", START + 500, START + 600)])
    assert (row["seconds"], row["cpu_mean_percent"], row["disk_read_gib"]) == (100.0, None, 0.0)


def test_bridges_are_not_counted_twice(trace: HostTrace) -> None:
    assert interfaces(trace) == (["eth0"], ["lo"])


def test_the_summary_is_of_the_whole_recording(tmp_path: Path) -> None:
    summary = summarize(read_recording(made_trace(tmp_path)))
    assert (summary["hosts"], summary["samples"], summary["recorded_seconds"]) == (1, 21, 20.0)
    assert (summary["disk_read_gib"], summary["network_sent_gib"], summary["sensors_missing"]) == (10.0, 2.0, 1)
    assert summary["sampler_core_percent"] == 0.5


def test_the_figure_has_a_band_per_phase_and_a_row_per_sensor_that_is_there(trace: HostTrace) -> None:
    figure = timeline_figure(trace, [Phase("idle", START, START + 9), Phase("load", START + 10, START + 20)])
    assert [(bar.name, bar.base[0], bar.x[0]) for bar in figure.data if bar.type == "bar"] == [
        ("idle", 0.0, 9.0),
        ("load", 10.0, 10.0),
    ]
    titles = [axis.title.text for axis in figure.select_yaxes() if axis.title.text]
    assert titles == ["CPU %", "memory GiB", "disk MB/s", "network MB/s"]
    assert len(figure.layout.shapes) == 2 * len(titles)


def test_a_card_gets_rows_of_its_own() -> None:
    times = np.array([0.0, 1.0])
    series = {
        ("cpu.busy", ""): (times, times),
        ("gpu.busy", "0"): (times, np.array([50.0, 70.0])),
        ("gpu.memory_used", "0"): (times, np.array([GIB, 2.0 * GIB])),
        ("pcie.sent", "0"): (times, np.array([0.0, 2e6])),
        ("gpu.process_memory", "0/77"): (times, np.array([GIB, GIB])),
        ("process.cpu", "77"): (times, np.array([90.0, 80.0])),
        ("gpu.temperature", "0"): (times, np.array([60.0, 61.0])),
        ("gpu.encoder", "0"): (times, np.zeros(2)),
        ("nvlink.sent_bytes", "0"): (times, np.array([0.0, 3e6])),
        ("nvlink.received_bytes", "0"): (times, np.array([0.0, 3e6])),
    }
    trace = HostTrace("box", {}, series)
    figure = timeline_figure(trace, [], named=lambda process: f"Loader {process}, job 01")
    titles = [axis.title.text for axis in figure.select_yaxes() if axis.title.text]
    assert titles == [
        "CPU %", "processes, % of a core", "GPU %", "GPU memory GiB", "GPU degrees C", "PCIe MB/s", "NVLink MB/s"
    ]  # fmt: skip
    assert {"Loader 77, job 01", "card 0: Loader 77, job 01"} <= {line.name for line in figure.data}
    [row] = phase_table(trace, [Phase("all", 0, 1)])
    assert (row["gpu_mean_percent"], row["gpu_memory_peak_gib"]) == (60.0, 2.0)


def test_phases_are_read_in_order_of_their_start(tmp_path: Path) -> None:
    rows = [{"name": "b", "start": 5, "end": 9}, {"name": "a", "start": 1, "end": 5}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_phases(tmp_path / "p.jsonl") == [Phase("a", 1, 5), Phase("b", 5, 9)]


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "a"}', '{"name": "a", "start": "x", "end": 2}'])
def test_a_line_that_is_no_phase_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"name": "a", "start": 1, "end": 2}\n' + line)
    with pytest.raises(UserError, match=r"p\.jsonl:2: not a phase"):
        read_phases(tmp_path / "p.jsonl")


def test_a_file_of_phases_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\xff")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(UserError, match=r"phases: .*cannot be read.*JSON lines"):
            read_phases(path)


def test_a_phase_that_ends_before_it_starts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"name": "a", "start": 3, "end": 2}')
    with pytest.raises(UserError, match="'a' ends before it starts"):
        read_phases(tmp_path / "p.jsonl")


def test_a_folder_without_samples_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the run folder of a 'workbench profile record'"):
        read_recording(tmp_path)
