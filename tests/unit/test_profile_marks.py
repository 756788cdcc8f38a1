"""Marks: said by any process of the host, heard by every recorder, on an axis that no clock bends."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from profiling import mark, phase
from profiling.clock import SteadyClock, measure_offset
from profiling.listener import MarkListener
from profiling.recorder import HostRecorder
from profiling.trace import read_recording
from workbench.errors import UserError
from workbench.files import read_json, write_json
from workbench.marks import sockets_folder


def test_a_mark_reaches_every_recorder_and_nobody_else_is_needed() -> None:
    mark("nobody", 1)
    one, other = MarkListener(), MarkListener()
    mark("step", 3, tokens=4096)
    subprocess.run([sys.executable, "-c", "from profiling import mark; mark('elsewhere')"], check=True)
    for listener in (one, other):
        listener.close()
        heard = listener.take()
        assert [(told["name"], told["value"]) for told in heard] == [("step", 3), ("elsewhere", "")]
        assert heard[0]["figures"] == {"tokens": 4096}


def test_the_socket_of_a_killed_recorder_is_cleared_away() -> None:
    listening = "from profiling.listener import MarkListener; import os; MarkListener(); os._exit(9)"
    before = set(sockets_folder().iterdir())
    subprocess.run([sys.executable, "-c", listening])
    assert len(set(sockets_folder().iterdir()) - before) == 1
    mark("step", 1)
    assert set(sockets_folder().iterdir()) <= before


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_MARKS", str(tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    mark("step", 1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_figures_of_numpy_and_torch_are_numbers_and_what_is_none_is_left_out() -> None:
    listener = MarkListener()
    mark(
        "step", 1, tokens=np.int64(5), loss=np.float32(0.5), rows=torch.tensor(3), who="me", lost=float("nan"), no=None
    )  # type: ignore[arg-type]
    with phase("load") as figures:
        figures["documents"] = np.int64(7)
    listener.close()
    step, _, load = listener.take()
    assert step["figures"] == {"tokens": 5, "loss": 0.5, "rows": 3}
    assert load["figures"] == {"documents": 7}


def test_a_folder_that_cannot_be_listened_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / ("long" * 30)):
        monkeypatch.setenv("WORKBENCH_MARKS", str(folder))
        with pytest.raises(UserError, match="WORKBENCH_MARKS"):
            MarkListener()


def test_a_listener_ends_whose_folder_was_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    monkeypatch.setenv("WORKBENCH_MARKS", str(folder))
    listener = MarkListener()
    mark("step", 1)
    shutil.rmtree(folder)
    listener.close()
    assert [told["name"] for told in listener.take()] == ["step"]


def test_an_empty_message_does_not_end_the_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_MARKS", str(tmp_path / "a"))
    listener = MarkListener()
    [name] = (tmp_path / "a").iterdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", str(name))
    mark("step", 1)
    listener.close()
    assert [told["name"] for told in listener.take()] == ["step"]


def test_phases_have_figures_and_one_that_never_ended_lasts_to_the_end(tmp_path: Path) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()
    with phase("load", 4) as figures:
        time.sleep(0.2)
        figures["tokens"] = 512
    open_phase = phase("serve")
    open_phase.__enter__()
    with pytest.raises(RuntimeError), phase("fails"):
        raise RuntimeError
    time.sleep(0.2)
    recorder.stop()
    recording = read_recording(tmp_path)
    load, serve, fails = recording.phases
    assert (load.name, load.figures, load.whole) == ("load 4", {"tokens": 512}, True)
    assert 0.2 <= load.seconds < 5
    assert (serve.name, serve.whole, serve.end) == ("serve", False, recording.span[1])
    assert fails.whole
    open_phase.__exit__(None, None, None)


def test_a_recorder_that_came_late_hears_of_the_beginning_at_the_end(tmp_path: Path) -> None:
    with phase("stage"):
        time.sleep(0.3)
        recorder = HostRecorder(str(tmp_path), hertz=20)
        recorder.ready()
    recorder.stop()
    recording = read_recording(tmp_path)
    [stage] = recording.phases
    assert stage.start < recording.span[0] - 0.25


def test_a_line_of_marks_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()
    mark("step", 1)
    mark("step", 2)
    recorder.stop()
    file = tmp_path / recorder.host / "marks.jsonl"
    foreign = json.dumps({"kind": "mark", "host": recorder.host, "monotonic": 1})
    file.write_text(f"{foreign}\n{file.read_text()[:-10]}")
    assert [one.value for one in read_recording(tmp_path).marks] == [1]


def test_a_wall_clock_that_jumps_is_noted_and_bends_no_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    mark("after", 1)
    time.sleep(1.2)
    recorder.stop()
    recording = read_recording(tmp_path)
    [trace] = recording.hosts.values()
    assert trace.span[1] - trace.span[0] < 60
    assert trace.span[0] <= recording.marks[0].time <= trace.span[1]
    [step] = trace.facts["clock_steps"]
    assert step["seconds"] == pytest.approx(3600, abs=1)


def test_a_sampler_that_starts_again_goes_on_with_the_axis(tmp_path: Path) -> None:
    first = HostRecorder(str(tmp_path), hertz=20)
    first.ready()
    first.stop()
    before = read_json(tmp_path / first.host / "host.json")["clock"]
    again = HostRecorder(str(tmp_path), hertz=20)
    again.stop()
    assert read_json(tmp_path / first.host / "host.json")["clock"] == before
    assert SteadyClock.start({**before, "boot": "another"}).wall != before["wall"]


def test_marks_from_before_another_start_of_the_host_stay_where_they_were(tmp_path: Path) -> None:
    first = HostRecorder(str(tmp_path), hertz=20)
    first.ready()
    mark("step", 1)
    first.stop()
    [told] = read_recording(tmp_path).marks
    file = tmp_path / first.host / "host.json"
    facts = read_json(file)
    facts["clock"] |= {"boot": "another", "monotonic": facts["clock"]["monotonic"] - 86400}
    write_json(file, facts)
    [again] = read_recording(tmp_path).marks
    assert again.time == pytest.approx(told.time)


def test_the_axis_goes_on_while_the_host_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock.start()
    real = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda which: real(which) + 600)  # of the clock that counts sleep
    assert clock.now() == pytest.approx(clock.wall + 600, abs=5)


def test_the_offset_of_a_clock_is_measured_within_half_a_round_trip() -> None:
    clock = SteadyClock.start()
    measured = measure_offset(lambda: clock.now() + 5.0, clock)
    assert abs(measured["offset"] - 5.0) <= measured["error"] + 1e-6


def test_hosts_are_joined_on_the_measured_offset(tmp_path: Path) -> None:
    recorder = HostRecorder(str(tmp_path), hertz=20)
    recorder.ready()
    mark("step", 1)
    recorder.stop()
    straight = read_recording(tmp_path)
    offsets = {recorder.host: [{"time": time.time(), "offset": 2.0, "error": 0.001}]}
    write_json(tmp_path / "clocks.json", {"reference": None, "offsets": offsets})
    moved = read_recording(tmp_path)
    assert straight.span[0] - moved.span[0] == pytest.approx(2.0)
    assert straight.marks[0].time - moved.marks[0].time == pytest.approx(2.0)
    assert json.dumps(moved.offsets) == json.dumps({recorder.host: 2.0})
