"""What was trained is handed on: the same logits in Transformers and PEFT, whole folders or none, and a card."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tiny_llama, without_fused_products
from trained_runs import CPU, IDS_BT, as_trained, exported, logits, make_run

from workbench.config import load
from workbench.errors import Failure, UserError
from workbench.runs import open_run
from workloads import export
from workloads.training.adapters import load_base
from workloads.training.checkpoint import complete

SETUPS = {"qlora": ["quantization=nf4"], "lora": ["quantization=none"], "full": ["method=full", "quantization=none"]}


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setenv("WORKBENCH_RUNS_ROOT", str(folder))
        patch.setenv("WANDB_MODE", "disabled")
        yield folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each set-up."""
    return {name: make_run(base, tmp_path_factory.mktemp(name), *keys) for name, keys in SETUPS.items()}


@pytest.fixture(scope="module")
def short(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were cut short after their last step."""
    return {
        name: make_run(base, tmp_path_factory.mktemp(name), *SETUPS[name], cut_short=True) for name in ("qlora", "full")
    }


@pytest.mark.parametrize("name", SETUPS)
def test_the_merged_model_is_the_one_that_was_trained(base: Path, runs: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, summary = exported(runs[name], "dtype=float32", "shard_gb=0.0002")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(model), as_trained(base, runs[name], name), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model), logits(load_base(str(base), "float32", "none", CPU)), atol=1e-2)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert summary["bytes"] == sum(file.stat().st_size for file in folder.rglob("*"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize("name", ["qlora", "lora"])
def test_the_adapter_has_the_trained_logits_in_peft(base: Path, runs: dict[str, Path], name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, _ = exported(runs[name], "format=adapter")
    if name == "qlora":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4)
    else:
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = logits(without_fused_products(PeftModel.from_pretrained(whole, folder)))
    assert torch.allclose(again, as_trained(base, runs[name], name), atol=1e-6, rtol=0)


def test_the_adapter_has_the_trained_logits_on_the_exported_base(base: Path, runs: dict[str, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    undone, _ = exported(runs["qlora"], "format=base", "dtype=float32")
    adapter, _ = exported(runs["qlora"], "format=adapter")
    again = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(undone), adapter))
    assert torch.allclose(again, as_trained(base, runs["qlora"], "qlora"), atol=1e-6, rtol=0)


def test_weights_are_in_the_dtype_of_the_base_where_none_is_named(runs: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder, summary = exported(runs["lora"])
    assert summary["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert exported(runs["full"])[1]["dtype"] == "float32"


def test_of_a_run_that_was_cut_short_it_is_the_last_checkpoint(base: Path, short: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    newest = complete(short["qlora"] / "checkpoints")[-1]
    folder, summary = exported(short["qlora"], "dtype=float32")
    assert summary["weights"] == newest.name == "step-00000004"
    wanted = as_trained(base, short["qlora"], "qlora", newest / "adapter")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), wanted, atol=1e-5, rtol=0)
    assert exported(short["qlora"], "step=2", "format=adapter")[1]["weights"] == "step-00000002"


def test_all_weights_are_read_from_a_checkpoint(base: Path, short: dict[str, Path], tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoModelForCausalLM

    dcp_to_torch_save(complete(short["full"] / "checkpoints")[-1], tmp_path / "state.pt")
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(wanted)
    wanted.load_state_dict(torch.load(tmp_path / "state.pt")["model"], strict=False)  # a tied head has one name
    folder, summary = exported(short["full"])
    assert (summary["weights"], summary["dtype"]) == ("step-00000004", "float32")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(wanted))
    assert not torch.allclose(before, logits(wanted), atol=1e-2)


def test_a_checkpoint_whose_loss_runs_away_is_passed_over(short: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "train-sft" / "run"
    shutil.copytree(short["qlora"], run)
    history = run / "checkpoints" / "step-00000004" / "history.json"
    told = json.loads(history.read_text())
    history.write_text(json.dumps({**told, "recent": [*told["recent"][:-1], 100.0]}))
    assert exported(run, "format=adapter")[1]["weights"] == "step-00000002"


def test_a_pretraining_that_was_cut_short_is_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from workloads.pretrain import PretrainConfig
    from workloads.pretraining import llama_config
    from workloads.tokenizer import train_tokenizer
    from workloads.training.history import History
    from workloads.training.ray_train import WorkerEvents
    from workloads.training.transformer import Transformer

    config = load(PretrainConfig, None, ["model.hidden_size=64", "model.layers=2", "model.mlp_size=64"])
    tokenizer = train_tokenizer(["CCO is ethanol"], 300, 128)
    with pytest.raises(KeyboardInterrupt), open_run("train", "pretrain", config) as run:
        tokenizer.save_pretrained(run.artifact("model"))
        model = Transformer(llama_config(config, tokenizer))
        with WorkerEvents(run.folder, 0, config) as events:
            events.checkpoint(History(step=3), model, torch.optim.AdamW(model.parameters()))
        raise KeyboardInterrupt
    folder, _ = exported(run.folder, f"out={tmp_path / 'out'}")
    assert json.loads((folder / "chemistry_split.json").read_text()) == {"split_seed": 0}
    ids = IDS_BT % 256
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits, atol=1e-5)


def test_the_card_says_what_it_is_of(runs: dict[str, Path], root: Path) -> None:
    from huggingface_hub import ModelCard

    folder, _ = exported(runs["qlora"], "format=adapter")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["sft", "adapter"] and card.data.base_model is None
    inputs = json.loads((runs["qlora"] / "inputs.json").read_text())
    summary = json.loads((runs["qlora"] / "summary.json").read_text())
    for said in (
        inputs["train"]["sha256"], inputs["base"]["sha256"], f"| rows | {summary['rows']} |",
        f"| tokens | {summary['tokens']:,} |", f"| validation_loss | {summary['validation_loss']:.6g} |",
        "| seed | 0 |",
        "| learning_rate | 0.01 |", f"| torch | {torch.__version__} |", "quantization_config=nf4", "rows.jsonl",
        "a LoRA adapter on the base in NF4 (QLoRA)", "--max-lora-rank 8",
    ):  # fmt: skip
        assert said in card.text, said
    assert str(root) not in card.content, "a card is made to be shown: no paths of this machine"


def test_a_base_of_the_hub_is_in_the_front_matter(runs: dict[str, Path]) -> None:
    from dataclasses import replace

    from workloads.model_card import _front_matter
    from workloads.trained_run import find_trained

    run = replace(find_trained(str(runs["lora"])), base="Qwen/Qwen3-1.7B")
    told = _front_matter(run, "adapter").to_dict()
    assert (told["base_model"], told["base_model_relation"]) == ("Qwen/Qwen3-1.7B", "adapter")


@pytest.mark.parametrize(
    ("of", "keys", "message"),
    [
        ("nothing", [], "no run 'nothing'"),
        ("full", ["format=adapter"], "trained all weights: there is no adapter"),
        ("lora", ["format=adapter", "dtype=bfloat16"], "leave dtype out"),
        ("lora", ["format=base"], "was not quantised: serve"),
        ("lora", ["step=7"], "has no checkpoint of step 7: it has those of 2, 4"),
        ("lora", ["base=/nowhere"], "no model there: /nowhere"),
        ("lora", ["out=/etc/passwd/here"], "out: /etc/passwd/here cannot be made: Not a directory"),
    ],
)
def test_what_cannot_be_exported_is_refused(runs: dict[str, Path], of: str, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exported(runs.get(of, Path(of)), *keys)


def test_a_run_without_a_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    run = make_run(base, tmp_path, "checkpoint_every=0", "keep_best=false", cut_short=True)
    with pytest.raises(UserError, match=r"did not finish \(failed\), and has no checkpoint"):
        exported(run)


def test_a_run_that_has_no_weights_is_refused(runs: dict[str, Path]) -> None:
    of, _ = exported(runs["lora"], "format=adapter")
    with pytest.raises(UserError, match="is of 'train export': give a run of train sft, train dpo"):
        exported(of.parents[1])


def test_a_base_that_has_gone_or_changed_is_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    run = make_run(mine, tmp_path, "quantization=none")
    (mine / "note.txt").write_text("another file")
    with pytest.raises(UserError, match=r"is not what train-sft/.* was tuned from"):
        exported(run)
    shutil.rmtree(mine)
    with pytest.raises(UserError, match=f"is gone: {mine}; say where it lies now, with base=FOLDER"):
        exported(run)
    assert exported(run, f"base={json.dumps(str(base))}")[1]["dtype"] == "bfloat16"


def test_a_folder_that_exists_is_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists, and is not replaced"):
        exported(runs["lora"], f"out={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_file_that_cannot_be_written_leaves_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(Failure, match="could not be written, and nothing of it is left"):
            exported(runs["lora"], f"out={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1,000,000,000.0 GB are needed and .* GB are free at"):
        export._check_room(tmp_path / "out", 10**18)
