"""Rows that Ray Data tokenizes while training runs: batches and losses of rows that lie ready, whatever is killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.state import list_tasks

import workloads.sft
import workloads.streaming
from workbench.config import load
from workbench.errors import UserError
from workbench.files import read_json, write_json
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics
from workloads.encoding import Recipe
from workloads.sft import SftConfig
from workloads.streaming import RowStream, StreamedBatches, open_stream
from workloads.tokenized import TokenRows, tokenize
from workloads.tokenizer import train_tokenizer
from workloads.training.batches import Batches
from workloads.training.dealing import Deal
from workloads.training.resume import STREAM

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

ROWS, TASKS = 600, 120
DEAL = Deal(batch_size=5, seed=3, capacity=128)


def talk(number: int, words: int = 0) -> dict[str, Any]:
    """A sum, of a length of its own; every tenth is not answered."""
    asked = f"What is {number} and {number}? " + "Think well. " * (words or number % 13)
    said = "" if number % 10 == 3 else f"It is {2 * number}."
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": f"talk-{number}", "messages": turns}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("streamed runs")
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder / "runs"))
        yield folder


@pytest.fixture(scope="module")
def file(root: Path) -> Path:
    file = root / "talks.jsonl"
    file.write_text("".join(json.dumps(talk(number)) + "\n" for number in range(ROWS)))
    return file


@pytest.fixture(scope="module")
def base(root: Path, file: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(file.read_text().splitlines(), 400, 512)
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "base")
    return root / "base"


def test_the_actor_deals_what_lies_ready_and_comes_back_when_its_process_is_killed(
    base: Path, file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(str(base), max_length=60)
    ready = Batches(TokenRows(tokenize(file, recipe, tmp_path / "cache")), DEAL.batch_size, DEAL.seed, DEAL.capacity)
    steps = len(ready.first_epoch()) + 3
    stream = open_stream(file, recipe, DEAL, known=10**6, ledger=tmp_path / "stream.jsonl")
    batches = StreamedBatches(stream)
    first = [batches[step] for step in range(4)]
    os.kill(ray.get(stream.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    assert [*first, *(batches[step] for step in range(4, steps))] == [ready[step] for step in range(steps)]
    assert batches.sources(5) == ready.sources(5)
    told, hosts = ray.get(stream.told.remote())
    assert told.counts.rows_dropped == ROWS // 10
    assert sum(hosts.values()) > ROWS
    ray.kill(stream)


def test_no_more_is_tokenized_ahead_than_its_share_of_memory_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads.streaming, "AHEAD_BYTES", 2 << 20)
    monkeypatch.setattr(workloads.streaming, "ROWS_OF_A_TASK", 8)
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(talk(10 * number, words=2000)) + "\n" for number in range(8 * TASKS)))
    recipe = Recipe(str(base), max_length=8000)
    stream = RowStream(long, recipe, Deal(batch_size=1, seed=0), 10**6, tmp_path / "stream.jsonl")
    stream.batch(0)
    time.sleep(5)
    tasks = list_tasks(ray.get_runtime_context().gcs_address, filters=[("state", "=", "FINISHED")], limit=10_000)
    done = sum("Map(tokenize)" in task.name for task in tasks)
    assert 2 <= done < TASKS / 2  # and it waits
    assert stream.batch(TASKS * 8 - 1)  # it goes on when it is asked


def config(base: Path, file: Path, *overrides: str) -> SftConfig:
    given = [
        f"base={json.dumps(str(base))}", f"data={json.dumps(str(file))}", "quantization=none", "max_length=64",
        "steps=24", "batch_size=4", "warmup_steps=1", "log_every=1", "workers=2", "cpus_per_worker=0.5",
        "adapter.rank=4", "learning_rate=0.01", "checkpoint_every=10", "validation_rows=8", "keep_best=false",
        "validate_every=0",
    ]  # fmt: skip
    return load(SftConfig, None, [*given, *overrides])


def sft(given: SftConfig, name: str) -> tuple[Path, dict[str, Any]]:
    with open_run("train", "sft", given, name=name) as run:
        summary = workloads.sft.run(given, run)
        finish(run, summary)
        return run.folder, summary


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if row.get("loss") is not None]


@pytest.fixture(scope="module")
def ready(base: Path, file: Path, ray_session: None) -> tuple[Path, dict[str, Any]]:
    """Trained on rows that were tokenized before."""
    return sft(config(base, file), "ready")


def test_streamed_training_has_the_losses_of_prepared_training_and_goes_on_with_another_number_of_workers(
    base: Path, file: Path, ready: tuple[Path, dict[str, Any]]
) -> None:
    folder, summary = sft(config(base, file, "streaming=true"), "streamed")
    assert losses(folder) == losses(ready[0])
    for key in ("rows", "rows_dropped", "truncated", "tokens", "tokens_lost"):
        assert summary[key] == ready[1][key], key
    assert summary["rows_dropped"] > 0
    assert "tokenized on" in (folder / "report.html").read_text()

    # as if it had been cut short after the checkpoint of step 20, in the middle of an epoch
    write_json(folder / "status.json", {**read_json(folder / "status.json"), "state": "failed"})
    given = config(base, file, "streaming=true", "workers=1", f"resume=train-sft/{folder.name}")
    after, summary = sft(given, "after")
    assert summary["resumed_from"] == 20
    assert losses(after) == pytest.approx(losses(ready[0]), abs=1e-5)
    assert (after / STREAM).is_file()


def test_a_row_that_the_template_refuses_stops_training_by_its_name(
    base: Path, file: Path, root: Path, ready: tuple[Path, dict[str, Any]]
) -> None:
    trained = [json.loads(line)["id"] for line in (ready[0] / "artifacts" / "train.jsonl").read_text().splitlines()]
    number = next(int(name[5:]) for name in trained if int(name[5:]) > 60 and int(name[5:]) % 10 != 3)
    template = root / "odd.jinja"
    template.write_text(
        f"{{% for m in messages %}}{{% if 'What is {number} ' in m.content %}}{{{{ raise_exception('not that') }}}}"
        "{% endif %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    given = config(base, file, "streaming=true", f"chat_template={json.dumps(str(template))}")
    with pytest.raises(UserError, match=f"talk-{number}: the chat template does not take this conversation: not that"):
        sft(given, "odd")


def test_workers_that_leave_no_cpu_are_refused(base: Path, file: Path) -> None:
    workers = int(ray.cluster_resources()["CPU"])
    given = config(base, file, "streaming=true", f"workers={workers}", f"batch_size={workers}", "cpus_per_worker=1")
    with pytest.raises(UserError, match="give a smaller cpus_per_worker, or streaming=false"):
        sft(given, "full")
