"""The Transformer of ``train pretrain`` is Llama: same weights, logits, losses; packed, recomputed and compiled too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workloads.training.batches import IGNORE, Row, collate
from workloads.training.compiling import prepare_layers
from workloads.training.config import TrainingConfig
from workloads.training.fsdp import decoder_layers, full_state
from workloads.training.losses import summed_loss
from workloads.training.packing import join
from workloads.training.transformer import Transformer, from_llama, to_llama

CPU = torch.device("cpu")
SHAPES = [{"num_key_value_heads": 2, "tie_word_embeddings": True}, {"num_key_value_heads": 4, "head_dim": 16}]
"""Grouped queries with a tied head; as many heads of keys, wider than the residual stream, with a head of its own."""


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "pad_token_id": 3, "initializer_range": 0.1, **changes})


def seeded(make: Any, **changes: Any) -> Any:
    torch.manual_seed(5)
    return make(llama_config(**changes))


def ids() -> Tensor:
    return torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_gives_the_weights_of_transformers_llama(shape: dict[str, Any]) -> None:
    ours, theirs = (dict(seeded(make, **shape).named_parameters()) for make in (Transformer, LlamaForCausalLM))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_saved_loads_into_transformers_with_equal_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    model = seeded(Transformer, **shape)
    to_llama(model.config, full_state(model)).save_pretrained(tmp_path)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(llama(ids()).logits, model(ids()).logits, atol=1e-6)
    assert torch.allclose(from_llama(llama)(ids()).logits, llama(ids()).logits, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_gradients_are_those_of_llama_padded_and_packed(packed: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    lengths = (5, 9, 7, 12)
    examples = [torch.randint(0, 60, (length,), generator=draw).tolist() for length in lengths]
    rows = [Row(example, [IGNORE, *example[1:]]) for example in examples]
    rows = [join(rows[:2]), join(rows[2:])] if packed else rows
    found = []
    for make in (Transformer, LlamaForCausalLM):
        model = seeded(make, **SHAPES[0])
        loss = summed_loss(model, rows, CPU, chunk=8).objective
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found[0][1], found[1][1], strict=True))


def test_a_packed_example_has_the_logits_that_it_has_alone() -> None:
    model, (first, second, _) = seeded(Transformer, **SHAPES[0]), ids().tolist()
    packed = collate([join([Row(first, first), Row(second, second)])], CPU)
    alone = model(torch.tensor([second])).logits
    assert torch.allclose(model(**packed.inputs).logits[:, 40:], alone, atol=1e-5)


def test_no_token_sees_those_after_it() -> None:
    model, changed = seeded(Transformer), ids()
    changed[:, 20:] = 0
    assert torch.equal(model(ids()).logits[:, :20], model(changed).logits[:, :20])


def test_padding_on_the_left_is_refused() -> None:
    mask = torch.ones_like(ids())
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="on the right"):
        seeded(Transformer)(ids(), mask)


def test_recomputed_blocks_give_the_same_loss_and_gradients() -> None:
    rows = [Row(row, row) for row in ids().tolist()]
    gradients = []
    for recomputed in (False, True):
        model = seeded(Transformer)
        assert len(decoder_layers(model)) == 2
        prepare_layers(model, TrainingConfig(workers=1, gradient_checkpointing=recomputed))
        summed_loss(model, rows, CPU).objective.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def test_a_block_is_one_graph_for_the_compiler() -> None:
    block = seeded(Transformer, **SHAPES[0]).model.layers[0]
    graph = torch.compile(block, backend="eager", dynamic=True, fullgraph=True)
    x_BTD, angles = torch.randn(2, 12, 32), torch.randn(2, 1, 12, 8)
    for mask in (None, torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()):
        given = (x_BTD, angles.cos(), angles.sin(), mask)
        assert torch.equal(graph(*given), block(*given))


def test_what_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no biases"):
        Transformer(llama_config(attention_bias=True))
