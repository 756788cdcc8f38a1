"""Pretrain, fine-tune, sweep and evaluate, with tiny models on real Ray Train, FSDP2 and bitsandbytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tune.sweep
import workloads.evaluate
import workloads.pretrain
import workloads.sft
from workbench.config import Config, load
from workbench.errors import Failure, UserError
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics
from workloads.training.checkpoint import complete

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1200)]

TINY = ["cpus_per_worker=0.5", "warmup_steps=1", "log_every=1"]
SFT = [*TINY, "steps=6", "batch_size=4", "max_length=128", "validation_rows=8", "validate_every=3", "adapter.rank=4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs root for this module, in a path with a space."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("my runs")
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder))
        yield folder


def command(
    module: Any, schema: type[Config], overrides: list[str], name: str, file: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Run a command as the command line does; its folder and summary."""
    config = load(schema, file, overrides)
    with open_run(*module.__name__.split("."), config, name=name) as run:
        summary = module.run(config, run)
        finish(run, summary)
        return run.folder, summary


@pytest.fixture(scope="module")
def base(root: Path, ray_session: None) -> Path:
    """A tiny pretrained model, made by two workers from chemistry alone."""
    sizes = ["model.hidden_size=64", "model.layers=2", "model.mlp_size=64", "vocabulary=400", "max_length=64"]
    folder, summary = command(
        workloads.pretrain, workloads.pretrain.PretrainConfig,
        [*sizes, *TINY, "steps=20", "batch_size=4", "learning_rate=0.01", "chemistry_copies=1", "checkpoint_every=0"],
        "base",
    )  # fmt: skip
    assert (folder / "report.html").is_file()
    curve = [row["loss"] for row in read_metrics(folder) if row.get("loss")]
    assert len(curve) == 20
    assert summary["loss"] < 0.9 * curve[0]
    return folder / "artifacts" / "model"


def sft(base: Path, name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
    return command(workloads.sft, workloads.sft.SftConfig, [f"base={json.dumps(str(base))}", *SFT, *overrides], name)


@pytest.fixture(scope="module")
def tuned(base: Path) -> tuple[Path, dict[str, Any]]:
    """QLoRA on two FSDP2 workers."""
    return sft(base, "qlora", "sample_every=3", "sample_prompts=2", "sample_tokens=8")


def losses(folder: Path) -> list[float]:
    """The loss of each step; of a step that was trained twice, the later one."""
    return list({row["step"]: row["loss"] for row in read_metrics(folder) if row.get("loss") is not None}.values())


def test_a_pretrained_model_loads_and_talks_in_its_chat_template(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count the rings.\nCCO"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = asked["input_ids"] if not isinstance(asked, torch.Tensor) else asked
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert model.config.eos_token_id == tokenizer.eos_token_id


def alone(base: Path, *overrides: str) -> list[float]:
    """The loss of each step of the same fine-tuning in this process, without Ray, workers or shards."""
    from workloads.chat_templates import load_tokenizer
    from workloads.encoding import encode
    from workloads.fine_tune import fine_tune
    from workloads.instructions import as_conversation, load_instructions
    from workloads.prepared import recipe_of

    class Nothing:
        def log(self, step: int, **values: float) -> None: ...

        def checkpoint(self, step: int, model: Any, optimizer: Any) -> None: ...

    single = ["workers=1", "strategy=single"]
    config = load(workloads.sft.SftConfig, None, [f"base={json.dumps(str(base))}", *SFT, *single, *overrides])
    data = load_instructions("chemistry", split_seed=0, seed=0, limit=config.steps * config.batch_size, held_out=8)
    tokenizer = load_tokenizer(config.base)
    rows, validation = (
        encode([as_conversation(row, "") for row in part], tokenizer, recipe_of(config))[0]
        for part in (data.train, data.validation)
    )
    done = fine_tune(
        config, rows, validation, device=torch.device("cpu"), events=Nothing(), result=base.parent / "alone"
    )
    return [loss for _, loss in done.history.train]


def test_two_sharded_workers_have_the_losses_of_one_process(base: Path, tuned: tuple[Path, Any]) -> None:
    assert losses(tuned[0]) == pytest.approx(alone(base), abs=1e-5)


def test_each_worker_stores_half_of_the_packed_base(tuned: tuple[Path, Any], base: Path) -> None:
    from workloads.training.adapters import add_adapter, load_base
    from workloads.training.config import AdapterConfig
    from workloads.training.fsdp import sharded_bytes

    whole = add_adapter(load_base(str(base), "float32", "nf4", torch.device("cpu")), AdapterConfig(rank=4))
    everything = sharded_bytes(whole)["local"]
    assert tuned[1]["bytes_of_rank_0"] == pytest.approx(everything / 2, rel=0.02)


def test_the_saved_adapter_and_the_merged_model_answer_alike(tuned: tuple[Path, Any], base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 40)[None]
    artifacts = tuned[0] / "artifacts"
    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = untouched(ids).logits
    adapted = PeftModel.from_pretrained(untouched, artifacts / "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(artifacts / "merged")(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(before, merged, atol=1e-2)


def test_the_saved_adapter_has_the_loss_that_was_reported(tuned: tuple[Path, Any], base: Path) -> None:
    from peft import PeftModel

    from workloads.chat_templates import load_tokenizer
    from workloads.conversations import read_conversations
    from workloads.encoding import Recipe, encode
    from workloads.training.adapters import load_base
    from workloads.training.loop import held_out_means

    artifacts, cpu = tuned[0] / "artifacts", torch.device("cpu")
    model = PeftModel.from_pretrained(load_base(str(base), "float32", "nf4", cpu), artifacts / "adapter")
    held_out = list(read_conversations(artifacts / "validation.jsonl"))
    rows, _ = encode(held_out, load_tokenizer(str(base)), Recipe(str(base), max_length=128))
    loss = held_out_means(model, rows, 4, cpu)["loss"]
    assert loss == pytest.approx(tuned[1]["validation_loss"], abs=1e-5)


def test_samples_under_way_are_what_the_saved_adapter_answers(base: Path, tuned: tuple[Path, Any]) -> None:
    """With the base and adapter sharded over two workers; those of the last step."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from workloads.training.adapters import load_base

    artifacts = tuned[0] / "artifacts"
    samples = [json.loads(line) for line in (artifacts / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [3, 3, 6, 6]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        load_base(str(base), "float32", "nf4", torch.device("cpu")), artifacts / "adapter"
    ).eval()
    for row in samples[2:]:
        asked = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
        said = model.generate(input_ids=asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :]
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_what_is_watched_reaches_metrics_and_report(tuned: tuple[Path, Any]) -> None:
    folder, summary = tuned
    last = read_metrics(folder)[-1]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "validation_loss"} < last.keys()
    assert {"peak_memory_gib/rank_0", "peak_memory_gib/rank_1"} < last.keys()
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 7))
    assert summary["tokens_per_second"] > 0
    titles = [section["title"] for section in json.loads((folder / "report.json").read_text())["sections"]]
    assert {"While it ran", "Samples"} < set(titles)


def test_every_checkpoint_holds_an_adapter_that_peft_loads(tuned: tuple[Path, Any], base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (kept,) = complete(tuned[0] / "checkpoints")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), kept / "adapter")
    assert kept.name == "step-00000003"  # the first look at the held-out loss is the best so far
    assert any(weight.abs().sum() > 0 for name, weight in adapted.named_parameters() if "lora_B" in name)


def test_training_that_diverges_is_stopped_once_and_names_what_it_read(base: Path) -> None:
    with pytest.raises(Failure, match=r"stopped: the (loss|gradient's norm) is \w+ at step \d+; the batch") as error:
        sft(base, "diverged", "learning_rate=1e30", "gradient_clip=1e30", "warmup_steps=0", "steps=20")
    assert "there is no checkpoint" in str(error.value) or "the last good checkpoint is" in str(error.value)


def test_workers_that_fit_nowhere_are_refused_at_once(base: Path) -> None:
    with pytest.raises(UserError, match="room for"):
        sft(base, "giant", "cpus_per_worker=1000")


def test_bf16_shards_train_with_an_adapter_in_fp32(base: Path) -> None:
    _, summary = sft(base, "bf16", "dtype=bfloat16", "steps=3")
    assert summary["validation_loss"] < 10


@pytest.mark.soak
def test_a_sweep_ends_with_its_best_trial_and_leaves_nothing_behind(base: Path, root: Path) -> None:
    import ray
    from ray.util.state import list_actors
    from transformers import AutoModelForCausalLM

    space = root / "space.yaml"  # a dotted key of the space is one key: only a file can say so
    space.write_text("space:\n  learning_rate: {loguniform: [0.0001, 0.1]}\n  adapter.rank: {choice: [2, 4]}\n")
    shared = [f"config.{item}" for item in SFT if not item.startswith("validate_every")]
    folder, summary = command(
        tune.sweep, tune.sweep.SweepConfig,
        [f"config.base={json.dumps(str(base))}", *shared, "config.validate_every=2", "scheduler.grace_steps=2"],
        "sweep", space,
    )  # fmt: skip
    assert summary["trials"] == 4
    assert summary["finished"] + summary["stopped_early"] == 4
    best = folder / "artifacts" / "best"
    assert AutoModelForCausalLM.from_pretrained(best / "merged").num_parameters() > 0
    again = load(workloads.sft.SftConfig, best / "config.yaml")
    assert (again.learning_rate, again.adapter.rank) == (summary["best_learning_rate"], summary["best_adapter.rank"])
    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    assert not [actor.class_name for actor in alive if "Trial" in actor.class_name or "_Inner" in actor.class_name]


def test_a_model_is_not_better_than_itself(base: Path) -> None:
    folder, summary = command(
        workloads.evaluate, workloads.evaluate.EvalConfig,
        [f"base={json.dumps(str(base))}", f"tuned={json.dumps(str(base))}", "limit=22", "max_new_tokens=4",
         "cpus_per_model=0.5"],
        "same",
    )  # fmt: skip
    assert summary["tuned_minus_base"] == 0
    assert not summary["tuned_beats_base"]
    assert not summary["tuned_beats_majority"]
    answers = [json.loads(line) for line in (folder / "artifacts" / "answers.jsonl").read_text().splitlines()]
    assert [row["base"] for row in answers] == [row["tuned"] for row in answers]


def test_an_adapter_is_evaluated_with_its_base(base: Path, tuned: tuple[Path, Any]) -> None:
    from workloads.generate import greedy_answers
    from workloads.instructions import read_questions

    artifacts = tuned[0] / "artifacts"
    rows = read_questions([artifacts / "test.jsonl"])[:12]
    said = [
        greedy_answers(str(artifacts / name), rows, device="cpu", batch_size=5, max_new_tokens=4)
        for name in ("adapter", "merged")
    ]
    assert said[0] == said[1]
