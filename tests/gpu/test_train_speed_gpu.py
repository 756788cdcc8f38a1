"""The training benchmark on a CUDA card: every side trains and is counted there. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_every_side_trains_in_bfloat16_on_the_card(kind: str, tmp_path: Path) -> None:
    from benchmarks.train_rows import Sizes, make
    from benchmarks.train_sides import Specification
    from benchmarks.train_speed import SIDES, measure

    tokens = sum(len(row.ids) for row in make(tmp_path, Sizes(2, 64, 128, 1000, 2), 64, 256))
    for side in SIDES[kind]:
        found = measure(Specification(side, str(tmp_path), 4, 1, 4, 256, kind == "packed", "lora", False, False, False))
        assert found["seconds"] > 0
        assert 0 < found["tokens"] < tokens
        assert found["memory"] < 4e9
        assert found["loss"] < 8  # ln 1000 and a bit
