"""The chunked loss: equal to the plain one in value and gradient, for every loss, head and model; and what it saves."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workloads.training.adapters import add_adapter
from workloads.training.batches import IGNORE, Row
from workloads.training.chunked_loss import Losses, LossFunction, chunked_loss, cross_entropy, loss_of
from workloads.training.config import AdapterConfig, TrainingConfig
from workloads.training.losses import regularised_cross_entropy, summed_loss, training_loss
from workloads.training.tensor_bytes import TensorBytes

smoothed = partial(regularised_cross_entropy, label_smoothing=0.1, z_loss=0.0)
with_z_loss = partial(regularised_cross_entropy, label_smoothing=0.0, z_loss=1e-2)
LOSSES: list[LossFunction] = [cross_entropy, smoothed, with_z_loss]
SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_model(family: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # logits large enough for scaling and capping to matter
    return model


def batch(rows: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on the right, and labels of which a third is not trained on."""
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 60, (rows, length), generator=draw)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -4:] = 0
    labels_BT = ids_BT.masked_fill((mask_BT == 0) | (torch.rand(rows, length, generator=draw) < 1 / 3), IGNORE)
    return {"input_ids": ids_BT, "attention_mask": mask_BT}, labels_BT


def gradients(model: nn.Module, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def magnitudes(head: nn.Linear, hidden_NH: Tensor, labels_N: Tensor, loss: LossFunction) -> list[Tensor]:
    """What the absolute terms of the gradient sum to, in float64: for the hidden states, the weight and the bias."""
    logits_NV = head(hidden_NH).detach().double().requires_grad_()
    [gradient_NV] = torch.autograd.grad(loss(logits_NV, labels_N), [logits_NV])
    above_NV, weight_VH = gradient_NV.abs(), head.weight.detach().double().abs()
    return [above_NV @ weight_VH, above_NV.T @ hidden_NH.detach().double().abs(), above_NV.sum(0)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 23), st.integers(1, 9), st.integers(2, 40), st.integers(1, 30), st.booleans(), st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(LOSSES),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_whole_logits(
    tokens: int, hidden: int, vocabulary: int, chunk: int, biased: bool, frozen: bool, dtype: torch.dtype,
    loss: LossFunction,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=biased).to(dtype).requires_grad_(not frozen)
    hidden_NH = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    labels_N = torch.randint(0, vocabulary, (tokens,))
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]

    logits_NV = head(hidden_NH)
    plain = loss(logits_NV.to(torch.promote_types(dtype, torch.float32)), labels_N)
    expected = torch.autograd.grad(3 * plain, [hidden_NH, *weights])
    losses = chunked_loss(hidden_NH, labels_N, head, weights, loss, chunk)
    found = torch.autograd.grad(3 * losses.objective, [hidden_NH, *weights])

    torch.testing.assert_close(losses.objective, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs, terms in zip(found, expected, magnitudes(head, hidden_NH, labels_N, loss), strict=False):
        if dtype == torch.bfloat16:  # each chunk's share is rounded once: an error in its terms, not in their sum
            assert ((ours.double() - theirs.double()).abs() <= 3 * (2**-6 * terms + 1e-6)).all()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_finite_differences(loss: LossFunction) -> None:
    head = nn.Linear(4, 7).double()
    hidden_NH = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels_N = torch.randint(0, 7, (5,))

    def objective(hidden: Tensor, *weights: nn.Parameter) -> Tensor:
        return chunked_loss(hidden, labels_N, head, list(weights), loss, 2).objective

    assert torch.autograd.gradcheck(objective, (hidden_NH, *head.parameters()))


def test_label_smoothing_and_z_loss_are_what_they_say() -> None:
    logits_NV, labels_N = torch.randn(9, 13) * 4, torch.randint(0, 13, (9,))
    torchs = F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=0.1)
    assert smoothed(logits_NV, labels_N).item() == pytest.approx(torchs.item(), rel=1e-6)
    by_hand = cross_entropy(logits_NV, labels_N) + 1e-2 * logits_NV.exp().sum(-1).log().square().sum()
    assert with_z_loss(logits_NV, labels_N).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [0, 1, 4, 512])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("Granite", {"logits_scaling": 7.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("GPT2", {"n_embd": 32}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # calls its body's decoder: logits are made whole
    ],
)  # fmt: skip
def test_every_model_has_the_loss_and_gradients_of_transformers(
    family: str, changes: dict[str, Any], chunk: int
) -> None:
    model = make_model(family, **changes).eval()
    inputs, labels_BT = batch()
    theirs = model(**inputs, labels=labels_BT).loss
    expected = gradients(model, theirs)
    ours = loss_of(model, inputs, labels_BT, cross_entropy, chunk).objective / (labels_BT[:, 1:] != IGNORE).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_alike(gradients(model, ours), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_an_adapter_has_the_same_gradients_also_on_the_head(targets: str | list[str]) -> None:
    model = add_adapter(make_model(), AdapterConfig(rank=2, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    inputs, labels_BT = batch()
    whole, cut = (loss_of(model, inputs, labels_BT, cross_entropy, chunk) for chunk in (0, 4))
    expected = gradients(model, whole.objective)
    assert any("lm_head" in name for name in expected) == (targets != "all-linear")
    assert_alike(gradients(model, cut.objective), expected)


def test_a_head_in_four_bits_has_the_same_gradients() -> None:
    from bitsandbytes.nn import Linear4bit

    model = make_model()
    packed = Linear4bit(32, 60, bias=False, quant_type="nf4", quant_storage=torch.float32)
    packed.load_state_dict(model.lm_head.state_dict())
    model.lm_head = packed.to("cpu")
    model.lm_head.weight.requires_grad_(False)
    inputs, labels_BT = batch()
    whole, cut = (loss_of(model, inputs, labels_BT, cross_entropy, chunk) for chunk in (0, 4))
    assert_alike(gradients(model, cut.objective), gradients(model, whole.objective))


def test_autocast_reaches_every_chunk() -> None:
    model = make_model(tie_word_embeddings=True)
    inputs, labels_BT = batch()
    with torch.autocast("cpu", torch.bfloat16):
        whole, cut = (loss_of(model, inputs, labels_BT, cross_entropy, chunk) for chunk in (0, 4))
    assert whole.objective.item() != loss_of(model, inputs, labels_BT, cross_entropy, 4).objective.item()
    assert cut.objective.dtype == torch.float32
    assert cut.objective.item() == pytest.approx(whole.objective.item(), rel=1e-3)
    assert_alike(gradients(model, cut.objective), gradients(model, whole.objective), 5e-2)


def test_what_is_reported_is_cross_entropy_whatever_is_minimised() -> None:
    config = TrainingConfig(label_smoothing=0.2, z_loss=1e-2)
    rows = [Row([5, 6, 7, 8], [IGNORE, 6, 7, 8]), Row([9, 10], [9, 10])]
    model, cpu = make_model(), torch.device("cpu")
    plain = summed_loss(model, rows, cpu)
    for chunk in (0, 2):
        regularised = summed_loss(model, rows, cpu, training_loss(config), chunk)
        assert regularised.cross_entropy.item() == pytest.approx(plain.cross_entropy.item(), rel=1e-6)
        assert regularised.objective.item() > plain.objective.item() + 0.1
        assert not regularised.cross_entropy.requires_grad


def test_no_targets_give_no_loss_and_a_gradient_of_zeros() -> None:
    model = make_model()
    inputs, labels_BT = batch()
    losses = loss_of(model, inputs, torch.full_like(labels_BT, IGNORE), cross_entropy, 4)
    assert losses.objective.item() == 0
    found = gradients(model, losses.objective)
    assert found.keys() == dict(model.named_parameters()).keys()  # ranks of a group must agree on what has a gradient
    assert not any(gradient.any() for gradient in found.values())


def test_evaluation_makes_no_gradient() -> None:
    model = make_model()
    inputs, labels_BT = batch()
    with torch.no_grad():
        losses = loss_of(model, inputs, labels_BT, cross_entropy, 4)
    assert not losses.objective.requires_grad
    assert losses.objective.item() == pytest.approx(
        loss_of(model, inputs, labels_BT, cross_entropy, 0).objective.item(), rel=1e-6
    )


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    def broken(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = make_model()
    inputs, labels_BT = batch()
    with pytest.raises(RuntimeError, match="broken"):
        loss_of(model, inputs, labels_BT, broken, 4)
    assert "forward" not in model.__dict__
    assert "forward" not in model.model.__dict__
    assert model(**inputs).logits.shape == (3, 11, 60)


def peak(trained: bool, chunk: int) -> int:
    """Bytes at the peak of a loss and its gradients, on tensors without storage."""
    head = nn.Linear(64, 8192, bias=False, device="meta").requires_grad_(trained)
    hidden_NH = torch.empty(1024, 64, device="meta", requires_grad=True)
    labels_N = torch.empty(1024, dtype=torch.long, device="meta")
    with TensorBytes() as counted:
        if chunk:
            losses = chunked_loss(hidden_NH, labels_N, head, list(head.parameters())[:trained], cross_entropy, chunk)
            losses.objective.backward()
        else:
            cross_entropy(head(hidden_NH).float(), labels_N).backward()
    return counted.peak


def test_chunks_need_less_than_half_of_the_memory() -> None:
    for trained in (False, True):
        assert peak(trained, 128) < 0.5 * peak(trained, 0)
    assert peak(False, 128) + 8192 * 64 * 4 <= peak(True, 128)  # a frozen head gets no gradient


def test_live_bytes_are_counted_once_and_until_they_are_freed() -> None:
    weight = torch.zeros(10, requires_grad=True)
    with TensorBytes([weight]) as counted:
        square = weight * weight
        view = square.view(2, 5)
        assert counted.now == 80
        del square
        assert counted.now == 80
        total = view.exp().sum()  # exp's result is kept for its gradient
        assert counted.now == 124
        total.backward()
        del view, total
        assert counted.now == 80  # the weight and its gradient
        assert counted.peak > 124
        torch.UntypedStorage.resize_(weight.untyped_storage(), 0)
        assert counted.now == 40


def test_bytes_from_before_are_not_counted_unless_given() -> None:
    weight = torch.zeros(4, 5)
    with TensorBytes() as counted:
        weight.t().add_(1)
        assert counted.now == 0
        copy = weight.t().contiguous()
        assert counted.now == copy.nbytes


def test_losses_is_what_a_sharded_root_can_return() -> None:
    from torch.utils._pytree import tree_leaves

    assert len(tree_leaves(Losses(torch.zeros(()), torch.zeros(())))) == 2
