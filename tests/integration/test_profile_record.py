"""Recording a real Ray: a load shows, a killed sampler loses a part at most, being told to stop is the normal end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from profiling import record
from profiling.cluster_recording import ClusterRecording
from profiling.recorder import PART_SECONDS
from profiling.timeline import phase_figures
from profiling.trace import Phase, read_recording
from workbench.runs import finish, open_run, state_of


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def samplers() -> list[psutil.Process]:
    names = ((process, process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]))
    mine = psutil.Process().children(recursive=True)
    return [process for process, line in names if line and "ray::HostRecorder" in line[0] and process in mine]


@pytest.mark.usefixtures("ray_session")
def test_a_load_shows_in_the_samples(tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def burn(seconds: float) -> tuple[float, float]:
        begun = time.time()
        while time.time() - begun < seconds:
            pass
        return begun, time.time()

    ray.get(burn.remote(0.01))  # the worker is up
    samples = ClusterRecording(tmp_path, hertz=4)
    kept = ray.put(bytes(5 << 20))
    start, end = ray.get(burn.remote(6))
    samples.stop()
    recording = read_recording(tmp_path)
    [trace] = recording.hosts.values()
    assert trace.values("object_store.used", "", start, end).max() >= 5 << 20
    del kept
    burning = [
        process for process in trace.devices("process.cpu") if "burn" in recording.process_name(trace.host, process)
    ]
    assert len(burning) == 1 and trace.values("process.cpu", burning[0], start, end).max() > 0
    assert abs(recording.offsets[trace.host]) < 0.1 and recording.clock_error < 1
    figures = phase_figures(trace, Phase("burn", start, end))
    assert len(trace.values("cpu.busy", "", start, end)) >= 6
    cores = [trace.values("cpu.core_busy", core, start, end) for core in trace.devices("cpu.core_busy")]
    assert max(busy.mean() for busy in cores) > 40
    assert figures["memory_peak_gib"] is not None and figures["memory_peak_gib"] > 0
    assert trace.facts["sampler_cpu_seconds"] < trace.facts["sampler_wall_seconds"] / 2
    until(lambda: not samplers())


@pytest.mark.usefixtures("ray_session")
def test_a_killed_sampler_loses_a_part_at_most_and_starts_again(tmp_path: Path) -> None:
    recording = ClusterRecording(tmp_path, hertz=4)
    until(lambda: list(tmp_path.glob("*/part-*.parquet")))
    [sampler] = samplers()
    time.sleep(1)
    killed = time.time()
    sampler.kill()
    [before] = read_recording(tmp_path).hosts.values()
    assert before.span[1] > killed - PART_SECONDS - 1
    parts = set(tmp_path.glob("*/part-*.parquet"))
    until(lambda: set(tmp_path.glob("*/part-*.parquet")) - parts)
    recording.stop()
    [after] = read_recording(tmp_path).hosts.values()
    assert after.span[0] == before.span[0] and after.span[1] > killed


@pytest.mark.usefixtures("ray_session")
def test_a_stop_file_ends_the_recording(runs_root: Path, tmp_path: Path) -> None:
    config = record.RecordConfig(hertz=4, stop_file=tmp_path / "stop")
    threading.Timer(3, (tmp_path / "stop").touch).start()
    with open_run("profile", "record", config) as run:
        summary = record.run(config, run)
        finish(run, summary)
    assert summary["hosts"] == 1 and summary["samples"] >= 1
    assert "Timeline of" in (run.folder / "report.html").read_text()


def test_being_told_to_stop_is_the_normal_end_of_a_recording(runs_root: Path) -> None:
    argv = [sys.executable, "-m", "workbench", "profile", "record", "hertz=4", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ})
    until(lambda: list(runs_root.glob("*/*/artifacts/samples/*/host.json")))
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0
    summary = json.loads(output)
    assert summary["samples"] >= 4
    assert state_of(Path(summary["run"])) == "finished"


def profiled(tmp_path: Path, **variables: str) -> tuple[Path, str]:
    """The run folder of a command that uses no Ray itself, recorded; and what it said."""
    from made import made_recording

    argv = [sys.executable, "-m", "workbench", "profile", "report", f"recording={made_recording(tmp_path)}"]
    done = subprocess.run(
        [*argv, "--profile", "--json"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["run"])
    assert list(folder.glob("artifacts/samples/*/part-*.parquet"))
    assert "Sampled while the command ran" in (folder / "report.html").read_text()
    return folder, done.stderr


def test_any_command_can_be_profiled(runs_root: Path, tmp_path: Path) -> None:
    folder, said = profiled(tmp_path)
    assert "this host alone is recorded" in said
    assert not list(folder.glob("artifacts/samples/clocks.json"))


@pytest.mark.usefixtures("ray_session")
def test_the_hosts_of_the_cluster_that_is_named_are_recorded(runs_root: Path, tmp_path: Path) -> None:
    import ray

    folder, said = profiled(tmp_path, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert "this host alone" not in said
    assert list(folder.glob("artifacts/samples/clocks.json"))
