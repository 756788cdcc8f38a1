"""Preference optimisation: the loss and gradients of its equations, on one process as on two, in 4 bits as in 16."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from workloads.training.adapters import add_adapter, load_base, trainable_parameters
from workloads.training.batches import IGNORE, Batches, Row
from workloads.training.checkpoint import Checkpoints
from workloads.training.chunked_loss import log_probabilities_of
from workloads.training.config import AdapterConfig, TrainingConfig
from workloads.training.fsdp import shard
from workloads.training.history import History
from workloads.training.loop import held_out_means, train
from workloads.training.packing import join
from workloads.training.pairs import Pairs, halves
from workloads.training.preference_loss import PreferenceLoss, adapter_off, preference_losses

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_pairs(count: int, seed: int = 1) -> list[Row]:
    """Prompts with two answers each, in tokens of two kinds, of which one is preferred."""
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(count):
        prompt = torch.randint(15, 60, (2 + index % 3,), generator=draw).tolist()
        sides = []
        for low, high in ((3, 9), (9, 15)):
            answer = torch.randint(low, high, (1 + (index + high) % 5,), generator=draw).tolist()
            sides.append(Row(prompt + answer, [IGNORE] * len(prompt) + answer, (f"row {index}",)))
        pairs.append(replace(join(sides), sources=(f"row {index}",)))
    return pairs


def make_model(family: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def moved(model: Any, targets: str | list[str] = "all-linear") -> Any:
    """``model`` with an adapter that is no longer a new one's zero."""
    model = add_adapter(model, AdapterConfig(rank=2, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: nn.Module, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def answer(model: Any, row: Row) -> Tensor:
    """The log-probability of an answer, by the whole softmax of one sequence."""
    logs_TV = F.log_softmax(model(input_ids=torch.tensor([row.ids])).logits[0], -1)
    learned = [place for place, label in enumerate(row.labels) if label != IGNORE]
    return torch.stack([logs_TV[place - 1, row.ids[place]] for place in learned]).sum()


@pytest.mark.parametrize(
    ("family", "changes", "targets"),
    [
        ("Llama", {"tie_word_embeddings": True}, ["q_proj"]),
        ("Llama", {}, ["q_proj", "lm_head"]),
        ("Gemma2", {"final_logit_softcapping": 0.5}, "all-linear"),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 64}, ["q_proj"]),  # its logits are made whole
    ],
)
def test_log_probabilities_of_chunks_are_those_of_the_whole(family: str, changes: Any, targets: Any) -> None:
    model = moved(make_model(family, **changes), targets).eval()
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 60, (3, 9), generator=draw)
    labels_BT = ids_BT.masked_fill(torch.rand(3, 9, generator=draw) < 0.4, IGNORE)
    logs_BTV = F.log_softmax(model(input_ids=ids_BT).logits[:, :-1], -1)
    kept_BT = labels_BT[:, 1:] != IGNORE
    by_hand = logs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0][kept_BT]
    weights = torch.randn(len(by_hand), generator=draw)
    expected = gradients(model, (weights * by_hand).sum())
    for chunk in (0, 4, 512):
        tokens = log_probabilities_of(model, {"input_ids": ids_BT}, labels_BT, chunk)
        torch.testing.assert_close(tokens, by_hand, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(model, (weights * tokens).sum()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "smoothed", "ipo", "with cross-entropy"])
def test_loss_and_gradients_are_those_of_the_equation(kind: str) -> None:
    base = make_model().double()
    model = moved(copy.deepcopy(base))
    rows, beta = make_pairs(3), 0.3
    losses = []
    for chosen, rejected in map(halves, rows):
        with torch.no_grad():
            before = answer(base, chosen) - answer(base, rejected)
        ratio = answer(model, chosen) - answer(model, rejected) - before
        p = torch.sigmoid(beta * ratio)
        losses.append(
            {
                "sigmoid": -p.log(),
                "smoothed": -0.8 * p.log() - 0.2 * (1 - p).log(),
                "ipo": (ratio - 1 / (2 * beta)) ** 2,
                "with cross-entropy": -p.log() - 0.5 * answer(model, chosen) / chosen.targets,
            }[kind]
        )
    by_hand = torch.stack(losses).sum()
    expected = gradients(model, by_hand)
    objective = PreferenceLoss(
        beta, "ipo" if kind == "ipo" else "sigmoid", 0.2 * (kind == "smoothed"), 0.5 * (kind == "with cross-entropy"), 3
    )
    sums = objective(model, rows, CPU)
    torch.testing.assert_close(sums.objective, by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(model, sums.objective), expected, rtol=1e-4, atol=1e-5)  # RMSNorm is float32


def test_what_is_watched_is_what_it_says() -> None:
    base = make_model()
    model = moved(copy.deepcopy(base))
    rows = make_pairs(5)
    means = held_out_means(model, rows, 2, CPU, PreferenceLoss(beta=0.3))
    with torch.no_grad():
        log_SP, before_SP = (
            torch.tensor([[answer(each, halves(row)[side]) for row in rows] for side in (0, 1)])
            for each in (model, base)
        )
    reward_SP = 0.3 * (log_SP - before_SP)
    margin_P = reward_SP[0] - reward_SP[1]
    by_hand = {
        "loss": -F.logsigmoid(margin_P), "margin": margin_P, "accuracy": (margin_P > 0).float(),
        "reward/chosen": reward_SP[0], "reward/rejected": reward_SP[1],
        "log_probability/chosen": log_SP[0], "log_probability/rejected": log_SP[1],
    }  # fmt: skip
    assert means == pytest.approx({name: values_P.mean().item() for name, values_P in by_hand.items()}, rel=1e-4)
    assert model.training


def test_the_first_loss_is_that_of_no_preference() -> None:
    model = add_adapter(make_model(), AdapterConfig(rank=2))
    for kind, loss in (("sigmoid", math.log(2)), ("ipo", 25.0)):
        sums = PreferenceLoss(beta=0.1, kind=kind)(model, make_pairs(2), CPU)  # type: ignore[arg-type]
        assert sums.objective.item() == pytest.approx(2 * loss, abs=1e-6)
        assert sums.watched[1:5].tolist() == [0, 0, 0, 0]


def test_margins_far_apart_have_finite_losses() -> None:
    margin_P = torch.tensor([-200.0, 0.0, 200.0])
    assert preference_losses(margin_P, 0.1, "sigmoid", 0.0).tolist() == pytest.approx([200, math.log(2), 0])
    assert preference_losses(margin_P, 0.1, "sigmoid", 0.25).tolist() == pytest.approx([150, math.log(2), 50])


def test_the_adapter_is_off_inside_alone() -> None:
    model = moved(make_model())
    ids = torch.arange(3, 12)[None]
    adapted, trained = model(ids).logits, [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="broken"), adapter_off(model):
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
        assert [p.requires_grad for p in model.parameters()] == trained
        raise RuntimeError("broken")
    assert torch.equal(model(ids).logits, adapted)


def test_pairs_are_rows_two_by_two() -> None:
    rows = [side for row in make_pairs(4) for side in halves(row)]
    pairs = Pairs([replace(row, sources=(f"{place // 2}",)) for place, row in enumerate(rows)])
    assert len(pairs) == 4
    assert [half for pair in pairs for half in halves(pair)] == rows
    assert pairs.lengths == [len(pair.ids) for pair in pairs[:]]
    assert [pair.sources for pair in pairs] == [("0",), ("1",), ("2",), ("3",)]


CASES: dict[str, tuple[str, str, str | list[str], dict[str, Any]]] = {
    "lora": ("none", "float32", "all-linear", {}),
    "lora, on the head too": ("none", "float32", ["q_proj", "lm_head"], {"micro_batch_size": 1}),
    "qlora": ("nf4", "float32", "all-linear", {}),
    "qlora, recomputed": ("nf4", "float32", "all-linear", {"micro_batch_size": 1, "gradient_checkpointing": True}),
    "qlora in bfloat16": ("nf4", "bfloat16", "all-linear", {}),
}
"""Name: quantization, dtype, the adapter's targets, other keys."""
GIVEN = {
    "steps": 6, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "workers": 1, "log_every": 1,
    "validate_every": 3, "checkpoint_every": 0, "loss_chunk": 5, "strategy": "single",
}  # fmt: skip


class Kept:
    """Events that keep their rows, and checkpoints where there is a folder for them."""

    def __init__(self, folder: Path | None = None) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.checkpoints = Checkpoints(folder, keep_last=9) if folder else None

    def log(self, step: int, **values: float) -> None:
        self.rows[step] = {key: value for key, value in values.items() if key.partition("/")[0] not in MEASURED}

    def checkpoint(self, history: History, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.checkpoints:
            self.checkpoints.save(history, model, optimizer)


MEASURED = ("tokens_per_second", "peak_memory_gib")


def tune(folder: Path, case: str, *, resume: bool = False, events: Kept | None = None) -> dict[int, dict[str, float]]:
    """The metrics of each step; sharded where there is a process group."""
    from workloads.training.compiling import prepare_layers

    quantization, dtype, targets, changes = CASES[case]
    events = events or Kept()
    every = 2 if events.checkpoints else 0
    config = TrainingConfig(**{**GIVEN, **changes, "checkpoint_every": every})
    model = load_base(str(folder / "base"), dtype, quantization, CPU)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = add_adapter(model, AdapterConfig(rank=4, alpha=8, targets=targets))
    prepare_layers(model, config)
    if dist.is_initialized():
        shard(model, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=config.learning_rate)
    history = events.checkpoints.load(model, optimizer) if events.checkpoints and resume else None
    rows = make_pairs(17)
    train(
        model, Batches(rows[:12], 4, seed=0), config, validation=rows[12:], events=events, optimizer=optimizer,
        objective=PreferenceLoss(beta=0.5, chunk=5), history=history,
    )  # fmt: skip
    if events.checkpoints:
        events.checkpoints.wait()
    return events.rows


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = {case: tune(folder, case) for case in CASES}
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what two processes that each hold half of it logged."""
    folder = tmp_path_factory.mktemp("two")
    make_model(num_hidden_layers=1).save_pretrained(folder / "base")
    mp.spawn(one_rank, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_have_the_figures_of_one(folder: Path, case: str) -> None:
    seen = {int(step): row for step, row in json.loads((folder / "rows.json").read_text())[case].items()}
    alone = tune(folder, case)
    assert seen.keys() == alone.keys() == set(range(1, 7))
    assert {"reward/chosen", "margin", "accuracy", "validation_log_probability/rejected"} < alone[6].keys()
    exact = CASES[case][1] == "float32"
    assert alone[1]["loss"] == pytest.approx(math.log(2), abs=1e-6 if exact else 1e-2)
    assert alone[6]["loss"] < 0.5
    assert alone[6]["validation_accuracy"] > 0.5
    for step, row in alone.items():
        assert seen[step]["loss"] == pytest.approx(row["loss"], abs=1e-5 if exact else 0.1)
        if exact:
            assert seen[step] == pytest.approx(row, rel=1e-4, abs=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    whole = tune(folder, "qlora", events=Kept(tmp_path / "whole"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "step-00000002").rename(tmp_path / "cut" / "step-00000002")
    again = tune(folder, "qlora", resume=True, events=Kept(tmp_path / "cut"))
    assert again == {step: row for step, row in whole.items() if step > 2}
