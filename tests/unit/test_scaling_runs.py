"""``train scaling``: which ladders are refused, what each run of one is, and what the report says of a law."""

from pathlib import Path
from typing import Any

import pytest

from workbench.config import CHECKOUT, load
from workbench.errors import UserError
from workbench.runs import finish, open_run
from workloads.scaling import ScalingConfig, check, report
from workloads.scaling_law import Law, bootstrap, fit

RECIPE = CHECKOUT / "configs/train/scaling.yaml"


def test_the_runs_differ_in_size_and_steps_alone() -> None:
    config = load(ScalingConfig, RECIPE, ["step_budgets=[300,100,200]"])
    rungs = config.rungs()
    assert len(rungs) == 15
    assert [(rung.model.hidden_size, rung.steps) for rung in rungs[:3]] == [(64, 100), (64, 200), (64, 300)]
    assert {rung.learning_rate for rung in rungs} == {0.003, 0.002}
    assert {(rung.batch_size, rung.model.context, rung.vocabulary) for rung in rungs} == {(16, 1024, 1024)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sizes=[{hidden_size: 64, layers: 2, mlp_size: 176}]", "1 sizes: a scaling law takes at least 4"),
        ("step_budgets=[100, 200]", "give at least three"),
        ("step_budgets=[10, 100, 200]", "10 steps: warmup_steps 30 leaves none"),
        ("sizes.0.hidden_size=40", "40 is no multiple of head_size 32"),
        ("early_stopping={patience: 2}", "early_stopping=null"),
    ],
)
def test_a_ladder_that_tells_no_law_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(ScalingConfig, RECIPE, [override, "keep_best=true"])


def test_only_a_ladder_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", str(tmp_path))
    config = load(ScalingConfig, RECIPE)
    with open_run("train", "pretrain", config) as run:
        finish(run, {})
    with pytest.raises(UserError, match="no ladder"):
        check(config.model_copy(update={"resume": f"train-pretrain/{run.folder.name}"}))


@pytest.mark.parametrize("tokens", [[1_000_000], [300_000, 1_000_000, 3_000_000]])
def test_the_report_has_the_law_the_figure_and_how_well_it_foretells(
    tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", str(tmp_path))
    truth = Law(0.5, 20.0, 0.3, 300.0, 0.5)
    rows: list[dict[str, Any]] = [
        {"run": f"r{n}-{d}", "parameters": n, "tokens": d, "loss": float(truth.loss(n, d)), "corpus": "c"}
        for n in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
        for d in tokens
    ]
    points = [(row["parameters"], row["tokens"], row["loss"]) for row in rows]
    law = fit(points)
    config = load(ScalingConfig, RECIPE)
    with open_run("train", "scaling", config) as run:
        summary = report(config, run, rows, law, bootstrap(points, law, 20, seed=0))
        finish(run, summary)
    assert summary["alpha"] == pytest.approx(0.3, rel=0.02)
    assert summary["extrapolated_parameters"] == 1e8
    assert summary["extrapolated_low"] <= summary["extrapolated_loss"] * 1.001
    assert abs(summary["largest_foretold_error"]) < 0.005
    assert ("beta" in summary) == (len(tokens) > 1)
    page = (run.folder / "report.html").read_text()
    assert all(text in page for text in ("Held-out loss against size", "Does it foretell?", "extrapolation"))
