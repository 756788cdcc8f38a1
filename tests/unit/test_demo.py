"""The demo's plan: what each step is told, and what is reused."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.demo import Demo, DemoConfig, FinishedSteps, fingerprint_of
from cluster.demo_display import Display
from cluster.stages import Stage, Step, stages
from workbench.cli import GROUPS
from workbench.commands import parse_arguments
from workbench.config import CHECKOUT, load
from workbench.files import write_json
from workbench.runs import Run

STEPS = [step for stage in stages() for step in stage.steps]


def finished_run(folder: Path) -> Path:
    write_json(folder / "status.json", {"state": "finished", "host": "h", "pid": 1})
    write_json(folder / "summary.json", {"rows": 3})
    return folder


def demo(runs_root: Path) -> Demo:
    folder = runs_root / "workbench-demo" / "now"
    folder.mkdir(parents=True)
    return Demo(DemoConfig(seed=5), Run(folder, DemoConfig(), "workbench demo"), Display(["one"]), ExitStack())


def test_each_step_is_a_valid_command(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    one = demo(runs_root)
    for step in STEPS:
        group, name, *arguments = one._arguments(step)
        one.results[step.key] = runs_root / "kind" / step.key
        command = GROUPS[group][1][name]
        load(command.schema(), *parse_arguments(command, arguments), visit_paths=False)


def test_a_step_only_names_runs_of_earlier_steps(runs_root: Path) -> None:
    one = demo(runs_root)
    for step in STEPS:
        one._arguments(step)
        one.results[step.key] = runs_root / "kind" / step.key
    assert "documents=runs/kind/audit/artifacts/documents" in one.commands["embed"]


def test_the_seed_reaches_the_steps_that_use_one(runs_root: Path) -> None:
    one = demo(runs_root)
    assert one._arguments(Step("a", ["train", "sft"], seeded=True)) == ["train", "sft", "seed=5"]
    assert one._arguments(Step("b", ["data", "audit"])) == ["data", "audit"]


def test_a_finished_step_is_reused_until_its_arguments_change(runs_root: Path) -> None:
    one = demo(runs_root)
    stage = Stage("S", [Step("a", ["data", "audit"]), Step("b", ["data", "embed", "documents={a}/x"])])
    steps = FinishedSteps(runs_root / "demo" / "finished.json")
    assert not one._reuse(stage)
    steps.put(fingerprint_of(["data", "audit"]), finished_run(runs_root / "data-audit" / "1"))
    assert not one._reuse(stage)
    assert one.results == {}
    steps.put(fingerprint_of(["data", "embed", "documents=runs/data-audit/1/x"]), finished_run(runs_root / "e" / "1"))
    assert one._reuse(stage)
    assert set(one.results) == {"a", "b"}


def test_a_run_without_its_summary_is_not_reused(runs_root: Path) -> None:
    steps = FinishedSteps(runs_root / "demo" / "finished.json")
    steps.put("f", finished_run(runs_root / "data-audit" / "1"))
    (runs_root / "data-audit" / "1" / "summary.json").unlink()
    assert steps.get("f") is None


def test_the_fingerprint_follows_the_config_file_s_text(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("limit: 1\n")
    before = fingerprint_of(["data", "embed", str(config)])
    config.write_text("limit: 2\n")
    assert fingerprint_of(["data", "embed", str(config)]) != before
