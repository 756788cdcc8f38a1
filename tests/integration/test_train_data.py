"""Conversations from a file to an adapter: tokenized by Ray Data, packed, the same losses on one worker and on two."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import workloads.sft
import workloads.tokenized
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics
from workloads.chat_templates import load_tokenizer
from workloads.encoding import Recipe
from workloads.fine_tune import fine_tune
from workloads.prepared import prepare, recipe_of
from workloads.sft import SftConfig
from workloads.tokenized import TokenRows, cache_folder, tokenize
from workloads.tokenizer import train_tokenizer

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

TALKS = [
    {
        "id": f"talk-{i}",
        "conversations": [
            {"from": "human", "value": f"What is {i} and {i}?"},
            {"from": "gpt", "value": f"It is {2 * i}."},
            *[{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "I am."}] * (i % 4),
        ],
    }
    for i in range(120)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data runs")
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder / "runs"))
        yield folder


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer([json.dumps(talk) for talk in TALKS], 400, 512)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    file = root / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return file


def config(base: Path, data: Path, *overrides: str) -> SftConfig:
    given = [
        f"base={json.dumps(str(base))}", f"data={json.dumps(str(data))}", "chat_template=plain", "quantization=none",
        "packing=true", "max_length=256", "steps=6", "batch_size=4", "warmup_steps=1", "log_every=1",
        "cpus_per_worker=0.5", "adapter.rank=4", "learning_rate=0.01",
    ]  # fmt: skip
    return load(SftConfig, None, [*given, *overrides])


class Nothing:
    """Events of a run that nobody watches."""

    def log(self, step: int, **values: float) -> None: ...

    def checkpoint(self, history: Any, model: Any, optimizer: Any) -> None: ...


def sft(given: SftConfig, name: str) -> tuple[Path, dict[str, Any]]:
    with open_run("workloads", "sft", given, name=name) as run:
        summary = workloads.sft.run(given, run)
        finish(run, summary)
        return run.folder, summary


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if row.get("loss") is not None]


def test_ray_data_writes_the_rows_that_one_process_does(
    base: Path, data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run("train", "sft", config(base, data)) as run:
        prepare(config(base, data), run)
        file = run.artifact("train.jsonl")
    recipe = Recipe(str(base), "plain", max_length=40)
    alone = tokenize(file, recipe, root / "alone")
    monkeypatch.setattr(workloads.tokenized, "SHARD_BYTES", 3000)
    spread = tokenize(file, recipe, root / "spread", spread=True)
    assert len(list(spread.glob("part-*.arrow"))) > 3
    assert len(list(alone.glob("part-*.arrow"))) == 1
    assert list(TokenRows(spread)) == list(TokenRows(alone))
    assert TokenRows(spread).counts == TokenRows(alone).counts
    assert TokenRows(alone).counts.rows_cut > 0


def test_a_mistake_that_a_task_finds_is_the_users(base: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, template = root / "odd.jsonl", root / "odd.jinja"
    row = json.dumps(
        {"id": "odd", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    )
    file.write_text(f"{row}\n" * 100)
    template.write_text("{{ raise_exception('no thanks') }}")
    monkeypatch.setattr(workloads.tokenized, "SHARD_BYTES", 2000)
    with pytest.raises(UserError, match="odd: the chat template does not take this conversation: no thanks"):
        tokenize(file, Recipe(str(base), str(template)), root / "odd", spread=True)
    assert not list((root / "odd").iterdir())


def test_packed_conversations_train_alike_on_one_worker_and_on_two(base: Path, data: Path) -> None:
    folder, summary = sft(config(base, data), "packed")
    given = config(base, data, "workers=1", "strategy=single", "micro_batch_size=1")
    rows, validation = (
        TokenRows(tokenize(folder / "artifacts" / f"{part}.jsonl", recipe_of(given), cache_folder()))
        for part in ("train", "validation")
    )
    device = torch.device("cpu")
    alone = fine_tune(given, rows, validation, device=device, events=Nothing(), result=folder / "alone")
    assert losses(folder) == pytest.approx([loss for _, loss in alone.history.train], abs=1e-5)
    assert losses(folder)[-1] < losses(folder)[0]
    assert summary["rows"] == 108
    assert summary["packing_efficiency"] > 0.9
    tuned = load_tokenizer(str(folder / "artifacts" / "merged"))  # keeps the template that it was tuned with
    asked = tuned.apply_chat_template([{"role": "user", "content": "Hm?"}], tokenize=False, add_generation_prompt=True)
    assert asked == "User:\nHm?\n\nAssistant:\n"
    assert "share of the packed sequences" in (folder / "report.html").read_text()
