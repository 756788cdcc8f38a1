"""Loss equality: the same tokens in each of 20 steps give the same losses on one, two and four processes, and today's.

``tests/loss_equality.py`` says what is trained, and records anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loss_equality import RECORDED, STEPS, WORLDS, ways_of

Losses = dict[int, dict[str, list[float]]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Every way on every number of processes, in float32 on CPUs."""
    file = tmp_path_factory.mktemp("equality") / "losses.json"
    script = Path(__file__).parents[1] / "loss_equality.py"
    subprocess.run(
        [sys.executable, str(script), "--to", str(file)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return {int(world): ways for world, ways in json.loads(file.read_text()).items()}


@pytest.mark.parametrize(("world", "way"), [(world, way) for world in WORLDS[1:] for way in ways_of(world)])
def test_several_processes_have_the_losses_of_one(losses: Losses, way: str, world: int) -> None:
    alone = losses[1][way.partition(" by ")[0]]
    assert len(alone) == STEPS
    assert losses[world][way] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
def test_recomputing_activations_changes_no_loss(losses: Losses, way: str) -> None:
    assert losses[1][f"{way}, recomputed"] == pytest.approx(losses[1][way], abs=1e-5)


@pytest.mark.parametrize("way", [way for way in ways_of(1) if way.endswith("compiled")])
def test_compiling_changes_no_loss(losses: Losses, way: str) -> None:
    assert losses[1][way] == pytest.approx(losses[1][way.removesuffix(", compiled")], abs=1e-5)


@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
def test_the_losses_are_those_that_were_recorded(losses: Losses, way: str) -> None:
    """A change that is meant to alter them records them anew: ``python tests/loss_equality.py --record``."""
    recorded = json.loads(RECORDED.read_text())[way]
    assert losses[1][way] == pytest.approx(recorded, abs=1e-4)
    assert losses[1][way][-1] < 0.9 * losses[1][way][0]
