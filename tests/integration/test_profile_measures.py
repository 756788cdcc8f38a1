"""What links and memories carry, measured on a real Ray; a collective that hangs is ended, with what to try."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from kills import found

from cluster.nodes import member_nodes
from profiling import collectives, flame, pcie
from profiling.collective_rank import interface_of
from workbench.errors import Failure, UserError
from workbench.runs import open_run

SMALL = {"smallest": 1024, "largest": 65536, "factor": 64, "rounds": 2, "repeats": 2, "cpus_per_worker": 0.5}


@pytest.mark.usefixtures("ray_session", "runs_root")
def test_collectives_between_two_workers_are_right_and_measured() -> None:
    config = collectives.CollectivesConfig(**SMALL)
    with open_run("profile", "collectives", config) as run:
        summary = collectives.run(config, run)
        tables = [section for section in run.report.sections if section["kind"] == "table"]
    assert (summary["ranks"], summary["wrong"]) == (2, 0)
    assert summary["backend"].endswith("on CPU") and "gloo" in summary["backend"]
    assert summary["all-to-all_bus_gb_per_s"] > 0
    assert len(tables[0]["cells"]) == 8


@pytest.mark.usefixtures("ray_session", "runs_root")
def test_a_rank_that_stands_still_is_named_with_advice() -> None:
    config = collectives.CollectivesConfig(**SMALL, timeout=8)
    stopped = []

    def stop_one() -> None:
        while not stopped:
            for process in found(os.getpid(), "ray::Rank.measure")[:1]:
                process.send_signal(signal.SIGSTOP)
                stopped.append(process)
            time.sleep(0.01)

    thread = threading.Thread(target=stop_one)
    thread.start()
    long = config.model_copy(update={"rounds": 2000, "repeats": 20})
    with (
        open_run("profile", "collectives", long) as run,
        pytest.raises(Failure, match=r"hangs: rank .*NCCL_P2P_DISABLE"),
    ):
        collectives.run(long, run)
    thread.join()
    _, alive = psutil.wait_procs(stopped, timeout=20)
    assert not alive


@pytest.mark.usefixtures("ray_session", "runs_root")
def test_ranks_are_pinned_to_a_host_without_labels_or_refused_at_once() -> None:
    [node] = member_nodes()
    assert node.unlabelled
    config = collectives.CollectivesConfig(
        **{**SMALL, "largest": 1024, "operations": ["all-gather"]}, hosts=[node.host], workers=2
    )
    with open_run("profile", "collectives", config) as run:
        assert collectives.run(config, run)["hosts"] == socket.gethostname()


@pytest.mark.usefixtures("ray_session", "runs_root")
def test_a_host_that_is_not_there_is_refused() -> None:
    config = pcie.PcieConfig(hosts=["nowhere"])
    with open_run("profile", "pcie", pcie.PcieConfig()) as run, pytest.raises(UserError, match="no host 'nowhere'"):
        pcie.run(config, run)
    wide = collectives.CollectivesConfig(workers=64)
    with open_run("profile", "collectives", wide) as run, pytest.raises(UserError):
        collectives.run(wide, run)


@pytest.mark.usefixtures("ray_session", "runs_root")
def test_an_actors_time_is_seen_from_outside() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Spinner:
        def spin_for(self, seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                sum(range(1000))

    actor = Spinner.options(name="spins").remote()
    ray.get(actor.spin_for.remote(0))
    end = time.monotonic() + 60
    while True:
        try:
            flame.find_actor("spins")
            break
        except (Failure, UserError):  # the dashboard is a moment behind
            assert time.monotonic() < end
            time.sleep(1)
    spinning = actor.spin_for.remote(60)
    config = flame.FlameConfig(actor="spins", seconds=2)
    with open_run("profile", "flame", config) as run:
        summary = flame.run(config, run)
    assert summary["samples"] > 10 and "spin_for" in summary["most_time_in"]
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(spinning)
    with pytest.raises(UserError, match="no actor 'spinz'"):
        flame.find_actor("spinz")


def test_pcie_measures_what_there_is(runs_root: object) -> None:
    argv = [sys.executable, "-m", "workbench", "profile", "pcie", "largest=65536", "rounds=3", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["wrong"] == 0 and summary["copies"] > 0
    assert any("within" in key for key in summary)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert [collectives.bus_factor("all-reduce", ranks) for ranks in (2, 4)] == [1.0, 1.5]
    assert [collectives.bus_factor(name, 4) for name in ("all-gather", "reduce-scatter", "all-to-all")] == [0.75] * 3
    assert interface_of("127.0.0.2") in ("lo", "lo0")
    assert interface_of("203.0.113.9") == ""
