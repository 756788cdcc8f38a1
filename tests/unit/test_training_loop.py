"""The loop: same loss however a batch is cut, a schedule, and batches by step."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from workbench.config import load
from workbench.errors import Failure, UserError
from workloads.sft import SftConfig
from workloads.training.batches import IGNORE, Batches, Row, collate
from workloads.training.config import TrainingConfig
from workloads.training.divergence import Diverged
from workloads.training.fsdp import check_storage
from workloads.training.history import History
from workloads.training.loop import learning_rate, train
from workloads.training.losses import summed_loss

CPU = torch.device("cpu")


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )


def make_rows(count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.randint(0, 50, (5 + index % 7,), generator=generator).tolist()
        rows.append(Row(ids, [IGNORE] * 3 + ids[3:]))
    return rows


class Silent:
    """Events that keep what they are told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, **values: float) -> None:
        self.rows.append((step, values))

    def checkpoint(self, history: History, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        pass


def losses(config: TrainingConfig) -> list[tuple[int, float]]:
    model, rows = make_model(), make_rows(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    batches = Batches(rows, config.batch_size, config.seed)
    return train(model, batches, config, validation=[], events=Silent(), optimizer=optimizer).train


def config(**changes: Any) -> TrainingConfig:
    given = {"steps": 6, "batch_size": 6, "warmup_steps": 2, "log_every": 1, "workers": 1, "checkpoint_every": 0}
    return TrainingConfig(**{**given, **changes})


def test_the_loss_falls() -> None:
    curve = losses(config(steps=30, learning_rate=1e-2))
    assert curve[-1][1] < 0.5 * curve[0][1]


def test_weights_that_the_last_step_ruined_are_no_result() -> None:
    model, rows, once = make_model(), make_rows(12), config(steps=1, warmup_steps=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=once.learning_rate)
    optimizer.register_step_post_hook(lambda *_: model.lm_head.weight.data.fill_(torch.nan))
    batches = Batches(rows, once.batch_size, once.seed)
    with pytest.raises(Diverged, match=r"the held-out loss is nan after step 1; .*lower learning_rate") as error:
        train(model, batches, once, validation=rows, events=Silent(), optimizer=optimizer)
    assert error.value.since == 1


def test_micro_batches_change_no_loss() -> None:
    whole, cut = losses(config()), losses(config(micro_batch_size=2))
    assert [loss for _, loss in cut] == pytest.approx([loss for _, loss in whole], abs=1e-5)


def test_logits_are_made_only_where_needed_and_the_loss_is_the_same() -> None:
    model, rows = make_model(), make_rows(4)
    ids, labels, mask, _ = collate(rows, CPU)
    logits = model(input_ids=ids, attention_mask=mask).logits
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert summed_loss(model, rows, CPU).objective.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_padding_changes_no_loss() -> None:
    model, rows = make_model(), make_rows(6)
    one_by_one = sum(summed_loss(model, [row], CPU).objective.item() for row in rows)
    assert summed_loss(model, rows, CPU).objective.item() == pytest.approx(one_by_one, rel=1e-5)


def test_an_epoch_has_every_row_once_and_a_batch_depends_on_its_step_alone() -> None:
    rows = [Row([i], [i]) for i in range(10)]
    batches = Batches(rows, 5, seed=0)
    epochs = [[row.ids[0] for step in (first, first + 1) for row in batches[step]] for first in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert Batches(rows, 5, seed=0)[3] == batches[3]


def test_rows_of_like_length_share_a_batch() -> None:
    draw = random.Random(0)
    rows = [Row([0] * length, [0] * length) for length in draw.choices(range(10, 100), k=320)]
    batches = Batches(rows, 20, seed=0)
    padded = sum(20 * max(len(row.ids) for row in batches[step]) for step in range(16))
    assert padded < 1.1 * sum(len(row.ids) for row in rows)
    lengths = [len(batches[step][0].ids) for step in range(16)]
    assert lengths != sorted(lengths)


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size=3"):
        Batches(make_rows(3), 4, seed=0)


def test_the_learning_rate_rises_then_falls_to_its_end() -> None:
    schedule = config(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(schedule, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_packed_bytes_are_never_cast() -> None:
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.fsdp import MixedPrecisionPolicy

    layer = Linear4bit(64, 64, quant_type="nf4", quant_storage=torch.float32).to("cpu")
    check_storage(layer, MixedPrecisionPolicy(param_dtype=torch.float32))
    check_storage(layer, MixedPrecisionPolicy())
    with pytest.raises(Failure, match="bnb_4bit_quant_storage"):
        check_storage(layer, MixedPrecisionPolicy(param_dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=5"], "batch_size 5 does not divide over 2 workers"),
        (["strategy=single"], "give workers=1"),
        (["strategy=zero3", "compile=true"], "compile=false, or strategy=fsdp2"),
        (["warmup_steps=200"], "leaves none of 200 steps"),
        (["method=full"], "quantization=none"),
        (["adapter.rnak=4"], "did you mean 'adapter.rank'"),
        (["learning_rate=.inf"], "learning_rate: Input should be a finite number"),
        (["adapter.alpha=.inf"], r"adapter\.alpha: Input should be a finite number"),
        (["seed=99999999999999999999"], "seed: Input should be less than"),
        (["adapter.targets=[]"], "give adapter.targets=all-linear"),
        (["data=/no/such/rows.jsonl"], "no such file"),
        (["base=/no/such/model"], "no model there"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_type(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(SftConfig, None, ["base=owner/model", *overrides])
