"""Which hosts a recording of a cluster samples, over nodes that are made."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from profiling import cluster_recording
from profiling.cluster_recording import ClusterRecording
from workbench.files import read_json


class Actor:
    """A recorder's handle whose answers are its values."""

    begun: list[str] = []  # noqa: RUF012

    def __init__(self, made: Any) -> None:
        self.ready = self.now = self.stop = self

    def options(self, scheduling_strategy: Any) -> "Actor":
        Actor.begun.append(scheduling_strategy.node_id)
        return self

    def remote(self, *_: Any) -> Any:
        return self if _ else time.time()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made = [{"NodeID": f"{n:056d}", "NodeManagerHostname": f"host-{n}", "Alive": True} for n in (1, 2)]
    Actor.begun = []
    monkeypatch.setattr(cluster_recording, "LOOK_FOR_HOSTS_SECONDS", 600.0)
    monkeypatch.setattr(ClusterRecording, "_name_actors", lambda self: None)
    monkeypatch.setattr(ray, "nodes", lambda: made)
    monkeypatch.setattr(ray, "remote", lambda **_: Actor)
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(ray, "wait", lambda waiting, num_returns, timeout: (waiting, []))
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return made


def test_a_host_that_comes_back_is_recorded_again(tmp_path: Path, nodes: list[dict[str, Any]]) -> None:
    samples = ClusterRecording(tmp_path)
    samples.refresh()
    assert samples.hosts == ["host-1", "host-2"] and len(Actor.begun) == 2
    nodes[1]["Alive"] = False
    samples.refresh()
    assert samples.hosts == ["host-1"]
    nodes.append({**nodes[1], "NodeID": f"{3:056d}", "Alive": True})
    samples.refresh()
    assert samples.hosts == ["host-1", "host-2"] and Actor.begun[-1] == f"{3:056d}"
    samples.stop()
    assert read_json(tmp_path / "clocks.json")["offsets"].keys() == {"host-1", "host-2"}


def test_a_recording_ends_in_order_where_every_host_has_died(tmp_path: Path, nodes: list[dict[str, Any]]) -> None:
    samples = ClusterRecording(tmp_path)
    for node in nodes:
        node["Alive"] = False
    samples.refresh()
    samples.stop()
    assert samples.hosts == []
