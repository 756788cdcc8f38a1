"""Runs of ``train sft`` made in this process by the code of its workers, without Ray; what is exported of them."""

import json
from pathlib import Path
from typing import Any

import torch

from workbench.config import load
from workbench.runs import finish, open_run
from workloads import export
from workloads.export import ExportConfig
from workloads.fine_tune import export_adapter, fine_tune
from workloads.prepared import prepare
from workloads.sft import SftConfig
from workloads.tokenized import TokenRows
from workloads.training.adapters import load_base
from workloads.training.ray_train import WorkerEvents

CPU = torch.device("cpu")
IDS_BT = torch.arange(5, 45)[None]


class CutShort(Exception):
    """What ends a run before its end."""


def make_run(base: Path, folder: Path, *overrides: str, cut_short: bool = False) -> Path:
    """Tune ``base`` for five steps, with a checkpoint after two and four; the run's folder. Data go to ``folder``."""
    rows = folder / "rows.jsonl"
    texts = ({"instruction": f"Say {n} twice.", "output": f"{n} {n}"} for n in range(60))
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = [
        f"base={json.dumps(str(base))}", f"data={json.dumps(str(rows))}", "steps=5", "batch_size=4", "warmup_steps=1",
        "max_length=64", "learning_rate=0.01", "validate_every=2", "checkpoint_every=2", "log_every=1",
        "adapter.rank=4", "workers=1", "strategy=single",
    ]  # fmt: skip
    config = load(SftConfig, None, [*given, *overrides])
    made: list[Path] = []
    try:
        with open_run("train", "sft", config) as run:
            made.append(run.folder)
            _train(config, run, cut_short)
    except CutShort:
        pass
    return made[0]


def _train(config: SftConfig, run: Any, cut_short: bool) -> None:
    prepared = prepare(config, run)
    with WorkerEvents(run.folder, 0, config, export_adapter if config.method == "lora" else None) as events:
        done = fine_tune(
            config, TokenRows(prepared.train), TokenRows(prepared.validation), device=torch.device("cpu"),
            events=events, result=run.artifact("adapter" if config.method == "lora" else "merged"),
        )  # fmt: skip
    if cut_short:
        raise CutShort
    loss = done.history.train[-1][1]
    finish(run, {"loss": loss, "validation_loss": done.history.validation[-1][1], "steps": 5, **prepared.summary})


def exported(of: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Export the run ``of`` as the command line does; the folder and the summary."""
    config = load(ExportConfig, None, [f"run={json.dumps(str(of))}", *overrides])
    export.check(config)
    with open_run("train", "export", config) as run:
        summary = export.run(config, run)
        finish(run, summary)
    return Path(summary["folder"]), summary


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(IDS_BT).logits
    return out


def as_trained(base: Path, run: Path, name: str, adapter: Path | None = None) -> torch.Tensor:
    """The logits of the model that was trained, put together as training does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if name == "full":
        return logits(AutoModelForCausalLM.from_pretrained(run / "artifacts" / "merged"))
    whole = load_base(str(base), "float32", "nf4" if name == "qlora" else "none", CPU)
    return logits(PeftModel.from_pretrained(whole, str(adapter or run / "artifacts" / "adapter")))
