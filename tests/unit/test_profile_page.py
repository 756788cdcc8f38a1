"""The page of a recording with cards, phases and marks, and of two recordings beside each other."""

from pathlib import Path

import numpy as np

from profiling.comparison import add_comparison
from profiling.page import add_pages, describe, summarize
from profiling.rules import findings
from profiling.trace import HostTrace, Mark, Phase, Recording
from workbench.report import Report

START = 1_000_000.0
GIB = 2.0**30


def recording(busy: float, width: float) -> Recording:
    times = START + np.arange(60.0)
    values = {
        ("cpu.busy", ""): 50.0, ("memory.used", ""): GIB, ("gpu.busy", "0"): busy, ("gpu.memory_used", "0"): 8 * GIB,
        ("gpu.power", "0"): 3 * busy, ("pcie.width", "0"): width, ("pcie.generation", "0"): 5,
        ("pcie.received", "0"): 1e9, ("pcie.sent", "0"): 1e8,
    }  # fmt: skip
    card = {"name": "RTX", "memory_bytes": 32 * GIB, "pcie_width_max": 16, "pcie_generation_max": 5}
    facts = {"cores": 8, "memory_bytes": 64 * GIB, "hertz": 1.0, "gpus": [card], "missing": {"nvlink": "Not Supported"}}
    trace = HostTrace("box", facts, {key: (times, np.full(60, value)) for key, value in values.items()})
    phases = [Phase("train", START, START + 40, "box", 7), Phase("epoch 1", START + 5, START + 20, "box", 7)]
    marks = [Mark("step", n, START + 2 * n, "box", 7, {"tokens": 100}) for n in range(11)]
    return Recording({"box": trace}, phases, marks)


def titles(report: Report, kind: str) -> list[str]:
    return [section["title"] for section in report.sections if section["kind"] == kind]


def test_a_page_has_findings_timelines_shares_histograms_and_units(tmp_path: Path) -> None:
    report = Report("x")
    add_pages(report, recording(busy=80, width=4))
    report.write(tmp_path / "page.html")
    assert titles(report, "table") == [
        "Findings", "Phases on box", "Shares of each card's time", "By step, token and document", "Not measured"
    ]  # fmt: skip
    assert titles(report, "figure") == ["Timeline of box", "Utilisation of the cards", "PCIe traffic"]
    page = (tmp_path / "page.html").read_text()
    assert "PCIe link of card 0 runs at x4 of x16" in page and "epoch 1" in page


def test_the_summary_has_energy_marks_and_findings() -> None:
    summary = summarize(recording(busy=80, width=4))
    assert (summary["phases"], summary["marks"], summary["gpu_mean_percent"]) == (2, 11, 80.0)
    assert summary["gpu_joules"] == 240.0 * 59
    assert summary["findings"] == [
        "box: PCIe link of card 0 runs at x4 of x16 (x4 in 100% of 60 samples, at most 15.8 GB/s)"
    ]


def test_two_recordings_stand_beside_each_other() -> None:
    report = Report("x")
    add_comparison(report, recording(busy=80, width=16), recording(busy=40, width=4))
    cells = {section["title"]: section["cells"] for section in report.sections if section["kind"] == "table"}
    assert ["gpu_mean_percent", "40", "80", "+100.0%"] in cells["Whole recordings"]
    assert ["train", "gpu_joules", "4,800", "9,600", "+100.0%"] in cells["Phases of one name"]
    assert ["token (steps)", "joules", "2.4", "4.8", "+100.0%"] in cells["Units of one name"]
    assert cells["Findings of one only"] == [["PCIe link of card 0 runs at x4 of x16", "yes"]]


def test_a_card_that_shares_the_hosts_memory_is_described_without_its_own() -> None:
    shown = recording(50, 16)
    trace = shown.hosts["box"]
    trace.facts["gpus"] = [{"name": "GB10", "memory_bytes": None}]
    assert "64.0 GiB of memory, GB10" in describe(trace, shown)


def test_a_link_of_no_known_generation_has_no_limit() -> None:
    shown = recording(90, 8)
    times, _ = shown.hosts["box"].series["pcie.generation", "0"]
    shown.hosts["box"].series["pcie.generation", "0"] = (times, np.zeros(60))
    assert "PCIe link of card 0 runs at x8 of x16" in {one.says for one in findings(shown)}
