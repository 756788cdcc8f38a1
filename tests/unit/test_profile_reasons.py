"""Why a measurement on a worker failed is said in one line, whatever became of the worker."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, WorkerCrashedError
from transformers import LlamaConfig

from cluster.nodes import Node
from cluster.placement import Placement
from profiling import flame, pcie, roofline
from profiling.reasons import reason
from workbench.errors import Failure


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError(), "ValueError"),
        (RayTaskError("f", "", Failure("py-spy: no")), "py-spy: no"),
        (RayTaskError("f", "", MemoryError()), "MemoryError"),
    ],
)
def test_a_reason_is_one_line_of_the_cause(error: BaseException, said: str) -> None:
    assert reason(error) == said


class Remote:
    """What ``ray.remote`` makes, of a worker whose every answer is its method's name."""

    def options(self, **_: Any) -> "Remote":
        return self

    def remote(self, *_: Any) -> "Remote":
        return self

    def __call__(self, made: Any) -> "Remote":
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: name)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every worker is made so; what the run says."""
    monkeypatch.setattr(ray, "remote", lambda *_, **__: Remote())
    monkeypatch.setattr(ray, "kill", lambda _: None)
    return []


def run_of(said: list[str]) -> Any:
    return SimpleNamespace(say=said.append)


@pytest.mark.parametrize("error", [WorkerCrashedError(), ActorDiedError(), RayTaskError("f", "", ValueError(""))])
@pytest.mark.parametrize("command", ["roofline", "flame", "pcie"])
def test_a_worker_that_dies_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str], command: str, error: Exception
) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(roofline, "place_here", lambda *_: Placement())
    monkeypatch.setattr(flame, "find_actor", lambda _: {"node_id": "0" * 56, "class_name": "A", "pid": 1})
    monkeypatch.setattr(pcie, "member_nodes", lambda: [Node("here", total={"CPU": 1.0})])
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8).save_pretrained(tmp_path)
    runs: dict[str, Any] = {
        "roofline": lambda: roofline.run(roofline.RooflineConfig(model=tmp_path), run_of(said)),
        "flame": lambda: flame.run(flame.FlameConfig(actor="a"), run_of(said)),
        "pcie": lambda: pcie.run(pcie.PcieConfig(), run_of(said)),
    }
    with pytest.raises(Failure, match=f": {type(getattr(error, 'cause', None) or error).__name__}"):
        runs[command]()


def test_the_clock_of_a_host_starts_when_it_is_free(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    asked: list[tuple[str, float | None]] = []

    def get(name: str, timeout: float | None = None) -> Any:
        asked.append((name, timeout))
        if name == "nvbandwidth":
            raise GetTimeoutError("no answer")
        rows = [{"way": "within card 0", "bytes": 1, "moved": 1, "seconds": [1.0], "wrong": 0}]
        return {"host": "busy", "rows": rows, "links": {}, "cards": {"0": "a"}, "left_out": []}

    monkeypatch.setattr(ray, "get", get)
    notes: list[Any] = []
    monkeypatch.setattr(pcie, "_report", lambda run, host, theirs, largest: notes.append(theirs))
    nodes = [Node("busy", total={"CPU": 1.0}, free={"CPU": 0.0})]
    pcie._measure(nodes[0], nodes, pcie.PcieConfig(smallest=1, largest=1, timeout=7), run_of(said))
    assert asked == [("ready", None), ("copies", 7.0), ("nvbandwidth", 7.0)]
    assert said[0] == "waits for 1 CPU: busy has 0 of 1 CPU free"
    assert notes == [{"missing": "nvbandwidth: GetTimeoutError: no answer"}]
