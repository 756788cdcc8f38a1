"""Sweeps of ``train dpo`` and ``train pretrain``, and population-based training: tiny ones, on real Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import wait_until
from sweeps import nothing_is_left, sweep, sweep_root, trials_of

import tune.sweep
from tune.config import SweepConfig
from workbench.config import load
from workbench.runs import finish, open_run

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900), pytest.mark.soak]

PAIRS = [{"prompt": f"Is {n} even?", "chosen": "yes" * (1 + n % 2), "rejected": "no" * (1 + n % 3)} for n in range(60)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sweep_root(tmp_path_factory.mktemp("workloads")) as folder:
        yield folder


def run(name: str, *keys: str) -> tuple[Path, dict[str, Any]]:
    """Run a sweep of these keys alone."""
    config = load(SweepConfig, None, list(keys))
    tune.sweep.check(config)
    with open_run("tune", "run", config, name=name) as opened:
        summary = tune.sweep.run(config, opened)
        finish(opened, summary)
        return opened.folder, summary


def test_a_sweep_of_preferences(root: Path) -> None:
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    folder, summary = run(
        "dpo", "workload=train dpo", f"config.base={root / 'base'}", f"config.data=[{root / 'pairs.jsonl'}]",
        "config.steps=12", "config.batch_size=4", "config.max_length=64", "config.warmup_steps=2",
        "config.validate_every=4", "config.validation_rows=4", "config.cpus_per_worker=0.5", "config.adapter.rank=4",
        "scheduler.grace_steps=4", "budget.trials=3", "space={beta: {loguniform: [0.05, 0.5]}}",
        "metrics={validation_loss: min, validation_accuracy: max}",
    )  # fmt: skip
    assert summary["finished"] + summary["stopped_early"] == 3
    assert summary["best_beta"] > 0 and "best_validation_accuracy" in summary
    assert (folder / "artifacts" / "best" / "adapter" / "adapter_config.json").is_file()


def test_a_sweep_of_new_models(root: Path) -> None:
    folder, summary = run(
        "pretrain", "workload=train pretrain",
        "config.model={hidden_size: 32, layers: 2, mlp_size: 64, head_size: 16, context: 256}", "config.vocabulary=300",
        "config.max_length=96", "config.steps=8", "config.batch_size=4", "config.warmup_steps=2",
        "config.chemistry_copies=1", "config.documents=null", "config.validate_every=4", "config.cpus_per_worker=0.5",
        "scheduler.grace_steps=4", "budget.trials=3", "space={learning_rate: {loguniform: [0.0005, 0.01]}}",
    )  # fmt: skip
    assert summary["finished"] + summary["stopped_early"] == 3
    assert (folder / "artifacts" / "best" / "model" / "config.json").is_file()


def test_a_population_copies_the_better_and_every_copy_knows_its_parent(root: Path) -> None:
    folder, summary = sweep(
        root, "pbt", "scheduler.kind=pbt", "scheduler.perturb_steps=10", "scheduler.quantile=0.5", "budget.trials=4",
        "concurrent=4", "config.adapter.rank=4",
    )  # fmt: skip
    trials = trials_of(folder)
    copies = [trial for trial in trials if trial.parent is not None]
    assert copies and summary["finished"] >= 2
    for copy in copies:
        assert copy.parent_step in (5, 10, 15, 20, 25, 30, 35)
        if copy.curve:
            assert copy.curve[0][0] > copy.parent_step
        parent = next(trial for trial in trials if trial.number == copy.parent)
        assert copy.point["adapter.rank"] == parent.point["adapter.rank"]
    assert {trial.state for trial in trials} <= {"finished", "stopped early"}
    assert not list(folder.glob("artifacts/trials/*/checkpoints"))
    assert "from" in json.loads((folder / "report.json").read_text())["sections"][1]["columns"]
    wait_until(nothing_is_left, 60, "the end of the trials' processes and placement groups")
