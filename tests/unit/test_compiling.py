"""Compiled and recomputed layers: no graph breaks, few compilations over changing lengths, the same losses."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from workloads.training.adapters import add_adapter, load_base
from workloads.training.batches import Row
from workloads.training.compiling import prepare_layers
from workloads.training.config import AdapterConfig, TrainingConfig
from workloads.training.fsdp import evaluation_mode
from workloads.training.losses import summed_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return str(folder)


def qlora(base: str, dropout: float = 0.0, **keys: Any) -> Any:
    """A LoRA adapter on NF4 weights, its layers prepared as a command's config says."""
    model = load_base(base, "float32", "nf4", CPU)
    torch.manual_seed(0)
    model = add_adapter(model, AdapterConfig(rank=4, dropout=dropout))
    prepare_layers(model, TrainingConfig(**keys))
    return model


def batches() -> Iterator[list[Row]]:
    """Batches of many lengths and sizes, padded and not."""
    draw = torch.Generator().manual_seed(1)
    for lengths in ([12, 7], [17, 5, 3], [30, 30], [41, 40], [9, 9], [16, 15, 16, 16], [33, 2]):
        ids = [torch.randint(0, 50, (length,), generator=draw).tolist() for length in lengths]
        yield [Row(row, row) for row in ids]


def curve(model: Any) -> list[float]:
    """The loss of each batch before a step on it, and of the last one without gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    losses = []
    for rows in batches():
        loss = summed_loss(model, rows, CPU).objective
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad(), evaluation_mode(model):
        return [*losses, summed_loss(model, rows, CPU).objective.item()]


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace graphs and guard them as ever, and run them as they are."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **keys: real(*args, **keys, backend="eager"))


def test_a_recomputed_qlora_layer_has_no_graph_breaks_and_few_compilations(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_only(monkeypatch)
    plain = curve(qlora(base))
    assert not counters["stats"]
    compiled = curve(qlora(base, compile=True, gradient_checkpointing=True))
    assert compiled == pytest.approx(plain, abs=1e-5)
    assert not counters["graph_break"]
    # Masked or not, the first layer (its input wants no gradient) or another, evaluation: five, whatever the lengths.
    assert 1 <= counters["stats"]["unique_graphs"] <= 6


def test_the_fastest_code_has_the_same_losses(base: str) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++, which torch.compile needs on a CPU")
    rows = next(batches())
    losses, gradients = [], []
    for keys in ({}, {"compile": True, "gradient_checkpointing": True}):
        model = qlora(base, **keys)
        loss = summed_loss(model, rows, CPU).objective
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_recomputation_draws_the_same_dropout_and_keeps_fewer_activations(base: str) -> None:
    rows = [Row([1, 2, 3] * 8, [1, 2, 3] * 8)] * 2
    losses, gradients, kept = [], [], []
    for recompute in (False, True):
        model = qlora(base, dropout=0.3, gradient_checkpointing=recompute)
        saved: list[int] = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            loss = summed_loss(model, rows, CPU).objective
        loss.backward()
        losses.append(loss.item())
        kept.append(sum(saved))
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.2 * kept[0]


def test_generation_with_a_cache_runs_uncompiled(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)
    ids = torch.tensor([[3, 4, 5]])
    model = qlora(base, compile=True, gradient_checkpointing=True).eval()
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert not counters["stats"]
        again = qlora(base).eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(said, again)
