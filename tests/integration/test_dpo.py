"""Tune on preferences end to end: two Ray Train workers, FSDP2 over our NF4 layers, a merged model and a report."""

import json
from pathlib import Path

import pytest
import torch

import workloads.dpo
from workbench.config import load
from workbench.runs import finish, open_run
from workbench.tracking import read_metrics
from workloads.preferences import read_preferences
from workloads.tokenizer import train_tokenizer

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

ROWS = [{"prompt": f"Is {n} even?", "chosen": "yes" * (1 + n % 2), "rejected": "no" * (1 + n % 3)} for n in range(60)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer([json.dumps(row) for row in ROWS], 330, 512)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_quantised_model_learns_preferences_on_two_workers(base: Path, tmp_path: Path, runs_root: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "?", "chosen": "x", "rejected": "x"}]))
    given = [
        f"base={json.dumps(str(base))}", f"data={json.dumps(str(data))}", "steps=12", "batch_size=4", "warmup_steps=1",
        "learning_rate=0.02", "max_length=32", "log_every=1", "validate_every=6", "checkpoint_every=6", "beta=0.5",
        "sample_every=6", "sample_prompts=1", "sample_tokens=2", "cpus_per_worker=0.5", "adapter.rank=4",
    ]  # fmt: skip
    config = load(workloads.dpo.DpoConfig, None, given)
    with open_run("train", "dpo", config) as run:
        summary = workloads.dpo.run(config, run)
        finish(run, summary)

    rows = {row["step"]: row for row in read_metrics(run.folder)}
    assert rows[1]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[12]["margin"] > rows[1]["margin"] == 0
    assert summary["validation_accuracy"] == rows[12]["validation_accuracy"] > 0.6
    assert summary["workers"] == 2
    assert {"Preferences", "Loss of a pair", "Samples"} <= {
        section["title"] for section in json.loads((run.folder / "report.json").read_text())["sections"]
    }
    assert (run.folder / "checkpoints" / "step-00000006" / "adapter" / "adapter_config.json").is_file()
    assert len(list(read_preferences(run.artifact("test.jsonl")))) == 3

    ids = torch.arange(5, 25)[None]
    whole = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(run.artifact("merged"))(ids).logits
    assert not torch.allclose(whole(ids).logits, merged, atol=1e-3)
    assert torch.allclose(PeftModel.from_pretrained(whole, run.artifact("adapter"))(ids).logits, merged, atol=1e-4)
