"""A recording of a cluster's hosts, submitted from the laptop: what their cards were told comes out.

A host whose Ray dies in the middle loses seconds, and is recorded again.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lab.cards import RTX_5060_TI, RTX_5090, write_cards
from lab.lab import Lab
from lab.site import BOX, HEAD, Site, until
from profiling.recorder import PART_SECONDS
from profiling.rules import findings
from profiling.trace import Recording, read_recording

pytestmark = pytest.mark.lab

BUSY = replace(RTX_5090, utilization=90, energy=1_000_000)
NARROW = replace(RTX_5060_TI, utilization=60, pcie_width=4)


def first_parts(lab: Lab) -> dict[str, Path]:
    """By host its folder of samples, once it has a whole part."""
    return {part.parent.name: part.parent for part in lab.storage.rglob("part-*.parquet")}


@pytest.fixture(scope="module")
def recorded(can_lab: None) -> Iterator[tuple[Recording, float]]:
    """The recording, and when the Ray of one host was killed."""
    with Lab.start({HEAD: [BUSY], BOX: [NARROW]}) as lab:
        site = Site(lab)
        site.discover()
        site.workbench("cluster up --yes")
        log = lab.folder / "recording.log"
        with site.dashboard():
            command = lab.laptop.start("exec workbench submit -- profile record seconds=75", log)
            until(lambda: first_parts(lab).keys() == {HEAD, BOX}, 120, f"samples of both hosts: {log}", pause=1)
            write_cards(lab[HEAD].path("/etc/nvidia-cards"), [replace(BUSY, energy=1_500_000)])
            time.sleep(PART_SECONDS)
            killed = time.time()
            assert lab[BOX].kill("/raylet/raylet ")
            assert command.wait(240) == 0, log.read_text()
        yield read_recording(first_parts(lab)[HEAD].parent), killed


def test_what_cards_were_told_comes_out(recorded: tuple[Recording, float]) -> None:
    recording, _ = recorded
    assert set(recording.hosts) == {HEAD, BOX}
    for host, busy in ((HEAD, 90), (BOX, 60)):
        assert set(recording.hosts[host].get("gpu.busy", "0")[1]) == {busy}
    assert recording.hosts[HEAD].joules(*recording.span, "0") == 500
    seen = [(one.host, one.rule) for one in findings(recording)]
    assert (BOX, "narrow link") in seen and (HEAD, "narrow link") not in seen
    begun = {host: trace.span[0] for host, trace in recording.hosts.items()}
    assert abs(begun[HEAD] - begun[BOX]) < 20


def test_a_host_that_died_lost_seconds_and_was_recorded_again(recorded: tuple[Recording, float]) -> None:
    recording, killed = recorded
    times, _ = recording.hosts[BOX].get("cpu.busy")
    before = times[times < killed]
    assert killed - before[-1] < PART_SECONDS + 3
    assert len(times) > len(before), "its new Ray was recorded, too"
    assert np.diff(times).max() > 3, "and what lies between is a gap"
