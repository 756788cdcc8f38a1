"""A ladder of tiny models, its law, a ladder that goes on with it, and a student of one of its models, on real Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import workloads.pretrain
import workloads.scaling
from workbench.config import load
from workbench.files import read_json
from workbench.runs import finish, open_run, run_id
from workbench.tracking import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

TINY = [
    "workers=1", "strategy=single", "cpus_per_worker=0.5", "steps=4", "batch_size=4", "warmup_steps=1", "log_every=1",
    "max_length=48", "vocabulary=320", "checkpoint_every=0", "keep_best=false",
]  # fmt: skip
SHAPES = ((32, 1), (32, 2), (64, 1), (64, 2))
SIZES = [f"{{hidden_size: {width}, layers: {layers}, mlp_size: 64}}" for width, layers in SHAPES]
LADDER = [*TINY, f"sizes=[{', '.join(SIZES)}]", "draws=20"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs root for this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder))
        yield folder


def command(name: str, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    module, schema = {
        "scaling": (workloads.scaling, workloads.scaling.ScalingConfig),
        "pretrain": (workloads.pretrain, workloads.pretrain.PretrainConfig),
    }[name]
    config = load(schema, None, overrides)
    module.check(config)  # type: ignore[attr-defined]
    with open_run("train", name, config) as run:
        summary = module.run(config, run)  # type: ignore[attr-defined]
        finish(run, summary)
        return run.folder, summary


@pytest.fixture(scope="module")
def ladder(root: Path, ray_session: None) -> tuple[Path, dict[str, Any]]:
    return command("scaling", LADDER)


def test_every_size_is_a_run_and_the_law_is_reported(ladder: tuple[Path, dict[str, Any]], root: Path) -> None:
    folder, summary = ladder
    rows = read_json(folder / "artifacts" / "ladder.json")
    assert [row["parameters"] for row in rows] == sorted(row["parameters"] for row in rows)
    assert len({row["corpus"] for row in rows}) == 1
    assert {row["run"] for row in rows} == {run_id(each) for each in (root / "train-pretrain").iterdir()}
    assert summary["runs"] == 4
    assert summary["alpha_low"] <= summary["alpha_high"]
    assert "Held-out loss against size" in (folder / "report.html").read_text()


def test_a_ladder_takes_over_what_another_has_finished(ladder: tuple[Path, dict[str, Any]], root: Path) -> None:
    before = set((root / "train-pretrain").iterdir())
    _, summary = command("scaling", [*LADDER, f"resume={run_id(ladder[0])}"])
    assert set((root / "train-pretrain").iterdir()) == before
    assert summary == ladder[1]


def test_a_student_is_pretrained_with_the_tokenizer_of_its_teacher(
    ladder: tuple[Path, dict[str, Any]], root: Path
) -> None:
    teacher = root / read_json(ladder[0] / "artifacts" / "ladder.json")[-1]["run"] / "artifacts" / "model"
    sizes = ["model.hidden_size=32", "model.layers=1", "model.mlp_size=64", "vocabulary=999"]
    folder, summary = command("pretrain", [*TINY, *sizes, f"distill.teacher={teacher}"])
    assert summary["vocabulary"] == 320
    assert read_json(folder / "artifacts" / "model" / "tokenizer.json") == read_json(teacher / "tokenizer.json")
    rows = read_metrics(folder)
    assert all(row["teacher_kl"] > 0 for row in rows if "loss" in row)
    assert "validation_teacher_kl" in rows[-1]
