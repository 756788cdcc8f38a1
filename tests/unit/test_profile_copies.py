"""Copies: every byte is checked, a link's share is of the link that the card has, nvbandwidth is read as it writes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from profiling import copies, nvidia
from profiling.copies import HOST, Way, measure
from profiling.nvbandwidth import read_answer, run_nvbandwidth
from profiling.pcie import PcieConfig, _limit, heat_map
from workbench.config import load
from workbench.errors import UserError


def test_a_host_without_a_card_measures_its_memory() -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this host has a card")
    host = copies.measure_host([1 << 10, 1 << 20], rounds=3)
    assert {row["way"] for row in host["rows"]} >= {"within memory, 1 thread"}
    assert all(row["wrong"] == 0 and len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in host["rows"])
    assert host["links"] == host["cards"] == {}


def test_a_byte_that_arrives_wrong_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = copies._runner

    def damaging(way: Way, pairs: list[Any]) -> Any:
        run = real(way, pairs)

        def and_damage(times: int) -> float:
            seconds = run(times)
            pairs[0][1][3:5] = 0
            return seconds

        return and_damage

    monkeypatch.setattr(copies, "_runner", damaging)
    assert measure(Way("x", HOST, HOST), 4096, rounds=1)["wrong"] == 2


def test_a_copy_through_the_host_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: real(*a, **k))
    assert measure(Way("x", HOST, HOST, staged=True), 4096, rounds=1)["wrong"] == 0


def test_both_directions_run_on_streams_of_the_card_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: made.append(device))
    card = torch.device("cuda", 1)
    copies._runner(Way("x", HOST, card, pinned=True, both=True), [(None, None, None)] * 2)  # type: ignore[list-item]
    assert made == [card, card]


def test_the_best_width_of_a_link_is_the_cards_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pynvml

    (tmp_path / "0000:c1:00.0").mkdir()
    for name, told in {"vendor": "0x10de", "max_link_width": "16"}.items():
        (tmp_path / "0000:c1:00.0" / name).write_text(f"{told}\n")
    monkeypatch.setattr(nvidia, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(uuid="x"))
    answers = {
        "Init": None, "DeviceGetHandleByUUID": None, "DeviceGetCurrPcieLinkGeneration": 4,
        "DeviceGetCurrPcieLinkWidth": 4, "DeviceGetMaxPcieLinkGeneration": 4, "DeviceGetMaxPcieLinkWidth": 4,
        "DeviceGetPciInfo": SimpleNamespace(busId="00000000:C1:00.0"),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)
    link = copies.link_of(torch.device("cuda", 0))
    assert (link["width"], link["width_max"]) == (4, 16)  # an x16 card in a slot of four lanes


LINKS = {"0": {"generation": 5, "width": 16}, "1": {"generation": 4, "width": 4}, "2": {"missing": "NVML"}}


@pytest.mark.parametrize(
    "way, limit",
    [
        ("host to card 0, pinned", 63.0),
        ("card 1 to host, pageable", 7.9),
        ("host and card 0, both at once", 126.0),
        ("card 0 to card 1, peer to peer", None),
        ("within card 0", None),
        ("host to card 2, pinned", None),
        ("within memory, 2 threads", None),
    ],
)
def test_the_limit_of_a_way_is_the_link_that_the_card_has(way: str, limit: float | None) -> None:
    found = _limit({"links": LINKS}, way)
    assert found == (None if limit is None else pytest.approx(limit, abs=0.05))


def test_the_heat_map_holds_the_best_way_of_each_pair() -> None:
    rates = {
        "host to card 0, pinned": 50.0, "host to card 0, pageable": 10.0, "card 0 to host, pinned": 48.0,
        "within card 0": 1500.0, "card 0 to card 1, through the host": 20.0, "card 0 to card 1, peer to peer": 40.0,
        "host and card 0, both at once": 90.0,
    }  # fmt: skip
    rows = [{"way": way, "bytes": 8, "gb_per_s": rate} for way, rate in rates.items()]
    grid = heat_map({"cards": {"0": "a", "1": "b"}, "table": rows}, 8).data[0].z
    assert np.array_equal(grid, [[np.nan, 50, np.nan], [48, 1500, 40], [np.nan] * 3], equal_nan=True)


def test_nvbandwidth_is_read_as_it_writes() -> None:
    cases = [
        {"name": "host_to_device_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["55.6", "26.1"]]},
        {"name": "device_to_device_memcpy_write_ce", "bandwidth_matrix": [["N/A", "24.5"], ["24.4", "N/A"]]},
        {"name": "device_to_host_memcpy_ce", "status": "Waived"},
    ]
    assert read_answer(json.dumps({"nvbandwidth": {"testcases": cases}})) == {
        "host to card 0, pinned": 55.6,
        "host to card 1, pinned": 26.1,
        "card 0 to card 1, peer to peer": 24.5,
        "card 1 to card 0, peer to peer": 24.4,
    }
    assert "no device" in read_answer(json.dumps({"nvbandwidth": {"error": "no device"}}))["missing"]


@pytest.mark.parametrize("answer", ["", "{}", "[]", '{"nvbandwidth": {}}', '{"nvbandwidth": {"testcases": [1]}}'])
def test_an_answer_of_nvbandwidth_that_is_none_does_not_end_the_measurement(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvbandwidth"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_nvbandwidth()["missing"].startswith("nvbandwidth")


def test_without_nvbandwidth_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_nvbandwidth() == {"missing": "nvbandwidth is not installed"}


def test_sizes_end_at_the_largest() -> None:
    assert PcieConfig(smallest=1024, largest=1 << 20, factor=8).sizes() == [1024, 8192, 65536, 524288, 1 << 20]
    with pytest.raises(UserError, match=r"largest \(1\) is smaller"):
        load(PcieConfig, None, ["largest=1"])
