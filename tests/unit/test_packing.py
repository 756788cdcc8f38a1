"""Packed examples: every row once, none too long, and losses and gradients as if each were alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workloads.training.batches import IGNORE, Batches, Row, collate, join
from workloads.training.dealing import best_fit
from workloads.training.losses import summed_loss
from workloads.training.packing import check_packing, refuse_leaking

CPU = torch.device("cpu")


def make_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2MoeConfig

    configs: dict[str, Any] = {
        "llama": LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "qwen2_moe": Qwen2MoeConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, decoder_sparse_step=1,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[name]).eval()


def make_rows(count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.randint(0, 50, (4 + index % 9,), generator=generator).tolist()
        rows.append(Row(ids, [IGNORE] * 2 + ids[2:], (f"file:{index}",)))
    return rows


def loss_of(model: Any, rows: list[Row]) -> torch.Tensor:
    return summed_loss(model, rows, CPU).objective


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(deadline=None, max_examples=80)
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths: list[int], capacity: int) -> None:
    sequences = best_fit(range(len(lengths)), lengths.__getitem__, capacity)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert all(0 < load <= capacity for load in loads)
    assert sum(load <= capacity / 2 for load in loads) <= 1  # two half-empty sequences would be one


def test_a_row_that_fits_no_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="21 tokens"):
        best_fit([3, 21], int, 20)


def test_a_sequence_names_its_examples_and_learns_no_first_token() -> None:
    packed = join([Row([1, 2], [1, 2], ("a",)), Row([3, 4, 5], [3, IGNORE, 5], ("b",))])
    assert packed == Row([1, 2, 3, 4, 5], [IGNORE, 2, IGNORE, IGNORE, 5], ("a", "b"), (0, 2))
    assert packed.targets == 2


def test_positions_restart_with_every_example_and_with_the_padding() -> None:
    rows = [join([Row([1, 2], [1, 2]), Row([3, 4, 5], [3, 4, 5])]), join([Row([6, 7, 8], [6, 7, 8])])]
    batch = collate(rows, CPU)
    assert batch.mask_BT is None
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_packed_losses_and_gradients_are_those_of_padded_rows(name: str, attention: str) -> None:
    model, rows = make_model(name), make_rows(12)
    model.set_attn_implementation(attention)
    packed = [join(sequence) for sequence in best_fit(rows, lambda row: len(row.ids), 24)]
    assert len(packed) < 6

    padded_loss = loss_of(model, rows)
    gradients = torch.autograd.grad(padded_loss, list(model.parameters()), allow_unused=True)
    packed_loss = loss_of(model, packed)
    assert packed_loss.item() == pytest.approx(padded_loss.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(packed_loss, list(model.parameters()), allow_unused=True), gradients, strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, atol=1e-5)

    alone = {row.sources[0]: loss_of(model, [row]).item() for row in rows}
    for sequence in packed:  # in a batch of one
        expected = sum(alone[source] for source in sequence.sources)
        assert loss_of(model, [sequence]).item() == pytest.approx(expected, abs=1e-5 * len(sequence.ids))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_of_packed_rows_is_that_of_transformers(name: str) -> None:
    model, rows = make_model(name), make_rows(9)
    packed = [join(sequence) for sequence in best_fit(rows, lambda row: len(row.ids), 24)]
    batch = collate(packed, CPU)
    theirs = model(**batch.inputs, labels=batch.labels_BT, use_cache=False).loss  # with a cache it sees no packing
    ours = loss_of(model, packed) / sum(row.targets for row in packed)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_batches_of_packed_rows_are_batches_of_sequences() -> None:
    rows = make_rows(60)
    batches = Batches(rows, batch_size=4, seed=3, capacity=30)
    first = batches.first_epoch()
    assert all(len(batch) == 4 for batch in first)
    seen = [source for batch in first for row in batch for source in row.sources]
    assert len(seen) == len(set(seen)) >= 60 - 3 * 8
    assert all(len(row.ids) <= 30 for batch in first for row in batch)
    assert batches.efficiency > 0.9
    later = batches[len(first) + 1]
    assert later not in first  # another epoch packs anew
    assert Batches(rows, 4, seed=3, capacity=30)[len(first) + 1] == later
    assert batches[1] == first[1]


def test_too_few_packed_sequences_are_refused() -> None:
    with pytest.raises(UserError, match="give batch_size=2 or less"):
        Batches(make_rows(5), 4, seed=0, capacity=20)


def test_a_model_that_carries_state_across_examples_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    check_packing(make_model("llama"), sequences=2)
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match="give packing=false"):
        check_packing(mamba, sequences=2)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_an_architecture_that_leaks_is_refused_before_any_worker_starts(family: str, tmp_path: Path) -> None:
    from transformers import JambaConfig, LlamaConfig, MambaConfig

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 6}
    heads = {"intermediate_size": 64, "num_attention_heads": 2}
    LlamaConfig(vocab_size=5000, pad_token_id=4999, **sizes, **heads).save_pretrained(tmp_path / "llama")
    refuse_leaking(str(tmp_path / "llama"))
    configs = {
        "mamba": lambda: MambaConfig(vocab_size=5000, state_size=4, **sizes),
        "jamba": lambda: JambaConfig(vocab_size=5000, mamba_d_state=4, num_key_value_heads=2, **sizes, **heads),
    }
    configs[family]().save_pretrained(tmp_path / family)
    with pytest.raises(UserError, match="give packing=false"):
        refuse_leaking(str(tmp_path / family))
