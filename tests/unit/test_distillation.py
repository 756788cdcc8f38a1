"""Distillation: the loss is Hinton's, the same however it is cut, and brings a student nearer to its teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import make_tiny_llama
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from workbench.config import load
from workbench.errors import UserError
from workloads.pretrain import PretrainConfig
from workloads.training.batches import IGNORE, Batches, Row, collate
from workloads.training.config import DistillConfig, TrainingConfig
from workloads.training.distillation import Distillation, check_teacher, divergence
from workloads.training.loop import held_out_means, train
from workloads.training.tensor_bytes import TensorBytes
from workloads.training.transformer import Transformer

CPU = torch.device("cpu")
SIZES = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_student(vocabulary: int = 40) -> Any:
    torch.manual_seed(1)
    return Transformer(LlamaConfig(vocab_size=vocabulary, hidden_size=32, initializer_range=0.1, **SIZES))


def make_teacher(vocabulary: int = 40) -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, initializer_range=0.3, **SIZES)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_rows(count: int = 6) -> list[Row]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 40, (5 + index % 4,), generator=draw).tolist() for index in range(count)]
    return [Row(ids, [IGNORE, IGNORE, *ids[2:]]) for ids in rows]


def objective(chunk: int = 0, share: float = 0.5, temperature: float = 2.0, **changes: Any) -> Distillation:
    given = {"teacher": make_teacher(), "top_k": 0, **changes}
    return Distillation(share=share, temperature=temperature, chunk=chunk, **given)


def logits(model: Any, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """At the positions that predict a target, and the targets."""
    ids_BT, labels_BT, mask_BT, _ = collate(rows, CPU)
    targets_BT = labels_BT[:, 1:] != IGNORE
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    return logits_BTV[:, :-1][targets_BT], labels_BT[:, 1:][targets_BT]


def test_the_loss_is_the_mixture_of_cross_entropy_and_divergence() -> None:
    student, rows, given = make_student(), make_rows(), objective(share=0.3, temperature=2.5)
    found = given(student, rows, CPU)
    own_NV, labels_N = logits(student, rows)
    other_NV, _ = logits(given.teacher, rows)
    hard = F.cross_entropy(own_NV, labels_N, reduction="sum")
    p_NV = (other_NV / 2.5).softmax(-1)
    kl = (p_NV * (p_NV.log() - (own_NV / 2.5).log_softmax(-1))).sum()
    torch.testing.assert_close(found.objective, 0.7 * hard + 0.3 * 2.5**2 * kl)
    torch.testing.assert_close(found.watched, torch.stack((hard, kl)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("top_k", "vocabulary"), [(0, 40), (5, 40), (0, 48)], ids=["all", "top_k", "padded"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_loss_nor_gradient(chunk: int, top_k: int, vocabulary: int) -> None:
    found = []
    for size in (0, chunk):
        student = make_student()
        sums = objective(size, top_k=top_k, teacher=make_teacher(vocabulary))(student, make_rows(), CPU)
        sums.objective.backward()
        found.append((sums, [parameter.grad for parameter in student.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_neither_models_logits_exist_for_more_than_a_chunk() -> None:
    vocabulary = 4096
    student, teacher = make_student(vocabulary), make_teacher(vocabulary)
    rows = [Row(ids, ids) for ids in torch.randint(0, 40, (4, 65), generator=torch.Generator().manual_seed(0)).tolist()]
    peaks = []
    for chunk in (0, 16):
        with TensorBytes() as counted:
            objective(chunk, teacher=teacher)(student, rows, CPU).objective.backward()
        student.zero_grad()
        peaks.append(counted.peak)
    logits = 4 * 64 * vocabulary * 4  # bytes of one model's
    assert peaks[0] > 4 * logits
    assert peaks[1] < 1.5 * logits


def test_any_model_may_teach() -> None:
    torch.manual_seed(4)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    teacher = teacher.eval().requires_grad_(False)
    student, rows = make_student(), make_rows()
    cut, whole = (objective(chunk, teacher=teacher)(student, rows, CPU).objective for chunk in (4, 0))
    torch.testing.assert_close(cut, whole)


def test_top_k_tells_no_more_than_every_token_and_all_of_it_at_the_end() -> None:
    torch.manual_seed(0)
    own_NV, other_NV = torch.randn(2, 20, 40)
    told = [divergence(own_NV, other_NV, 2.0, k).item() for k in (1, 5, 20, 0)]
    assert told == sorted(told)
    assert told[0] > 0
    assert divergence(own_NV, other_NV, 2.0, 39).item() == pytest.approx(told[3], rel=1e-5)


def test_a_taught_student_comes_nearer_to_its_teacher_than_one_that_reads_the_text_alone() -> None:
    class Silent:
        def log(self, step: int, **values: float) -> None: ...

        def checkpoint(self, *_: Any) -> None: ...

    config = TrainingConfig(steps=40, batch_size=6, warmup_steps=2, learning_rate=0.01, workers=1, validate_every=0)
    given, rows = objective(4, share=0.5), make_rows()
    before = [weight.clone() for weight in given.teacher.parameters()]
    far = []
    for taught in (given, None):
        student = make_student()
        far.append(held_out_means(student, rows, 6, CPU, given)["teacher_kl"])
        optimizer = torch.optim.AdamW(student.parameters())
        batches = Batches(rows, 6, seed=0)
        train(student, batches, config, validation=[], events=Silent(), optimizer=optimizer, objective=taught)
        far.append(held_out_means(student, rows, 6, CPU, given)["teacher_kl"])
    assert far[1] < 0.5 * far[0]
    assert far[1] < 0.5 * far[3]
    assert all(map(torch.equal, before, given.teacher.parameters()))


def test_a_teacher_with_another_tokenizer_or_a_shorter_context_is_refused(tmp_path: Path) -> None:
    folder = str(make_tiny_llama(tmp_path / "teacher", context=64, hidden=64))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    distill = DistillConfig(teacher=folder)
    check_teacher(distill, tokenizer, 64)
    with pytest.raises(UserError, match="give max_length=64"):
        check_teacher(distill, tokenizer, 65)
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match=r"1 of 10\d\d and 10\d\d differ \('<\|new\|>' is 10\d\d and None\)"):
        check_teacher(distill, tokenizer, 64)


def test_a_teacher_without_a_tokenizer_or_weights_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "teacher", context=64, hidden=64)
    for name, message in (("tokenizer.json", "tokenizer of .* cannot be read"), ("model.safetensors", "no weights")):
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"distill.teacher: .*{message}"):
            check_teacher(DistillConfig(teacher=str(folder)), None, 64)


def test_two_ways_to_soften_the_targets_are_refused() -> None:
    with pytest.raises(UserError, match="label_smoothing=0"):
        load(PretrainConfig, None, ["distill.teacher=owner/model", "label_smoothing=0.1"])
