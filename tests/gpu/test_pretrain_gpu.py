"""The Transformer and a teacher on a CUDA card. Skipped where there is none."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)

from transformers import LlamaConfig

from workloads.training.batches import Row
from workloads.training.distillation import Distillation
from workloads.training.packing import join
from workloads.training.transformer import Transformer

CUDA = torch.device("cuda")


def make(width: int, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(width)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=500, hidden_size=width, intermediate_size=256, initializer_range=0.1, **heads)
    return Transformer(config).to(CUDA, dtype)


def make_rows(packed: bool) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    rows = [Row(ids, ids) for ids in torch.randint(0, 500, (4, 90), generator=draw).tolist()]
    return [join(rows[:2]), join(rows[2:])] if packed else rows


@pytest.mark.parametrize("packed", [False, True])
def test_a_student_learns_in_bfloat16_as_in_float32(packed: bool) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make(64, dtype), make(128, dtype).eval().requires_grad_(False)
        given = Distillation(teacher, 0.5, 2.0, top_k=0, chunk=64)
        sums = given(student, make_rows(packed), CUDA)
        sums.objective.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in student.parameters())
        losses.append(sums.objective.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
