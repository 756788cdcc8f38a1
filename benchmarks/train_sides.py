"""One side of ``benchmarks.train_speed`` in a process of its own: ``SPECIFICATION.json``, whose result goes beside it.

Each side loads the same model, puts the same adapter on it and makes the same number of steps of AdamW over the same
rows. Counted is from the end of the first ``warm`` steps to the end of the last one, so neither loading nor compiling.
"""

import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.train_rows import read
from workloads.training.batches import Row, collate
from workloads.training.tensor_bytes import TensorBytes


@dataclass(frozen=True)
class Specification:
    """What a side is to do. ``count`` counts tensor bytes, which takes time, instead of measuring it."""

    side: str
    folder: str
    steps: int
    warm: int
    batch: int
    max_length: int
    packing: bool
    method: str
    recompute: bool
    compile: bool
    count: bool

    @property
    def singly(self) -> bool:
        """Whether a step's sequences go through the model one by one."""
        return "one by one" in self.side

    @property
    def device(self) -> torch.device:
        """The first CUDA card, or the CPU."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def rows(self) -> list[Row]:
        """All rows; to count bytes one row many times, so that all batches of all sides are alike: the longest, or the
        longest of which four fill a sequence."""
        rows = read(Path(self.folder))
        if not self.count:
            return rows
        each = 4 if self.packing else 1
        fitting = [row for row in rows if len(row.ids) <= self.max_length // each]
        return [max(fitting, key=lambda row: len(row.ids))] * (each * self.batch * self.steps)

    @property
    def config(self) -> Any:
        """The same as a config of ours."""
        from workbench.config import load
        from workloads.sft import SftConfig

        asked = {
            "base": str(Path(self.folder) / "base"), "method": self.method, "quantization": "none", "workers": 1,
            "strategy": "single", "gpus_per_worker": int(self.device.type == "cuda"), "steps": self.steps,
            "batch_size": self.batch, "max_length": self.max_length, "packing": self.packing,
            "gradient_checkpointing": self.recompute, "compile": self.compile, "warmup_steps": 0,
            "learning_rate": 1e-4, "micro_batch_size": int(self.singly), "log_every": self.warm, "validate_every": 0,
            "checkpoint_every": 0, "seed": 0,
        }  # fmt: skip
        return load(SftConfig, None, [f"{key}={json.dumps(value)}" for key, value in asked.items()])


class Watch:
    """Time and memory between the end of step ``warm`` and that of the last."""

    def __init__(self, given: Specification) -> None:
        self._given = given
        self._held = psutil.Process().memory_info().rss  # packages are imported, no model is loaded
        self._counted: TensorBytes | None = None
        self._begun = self._cpu_begun = self.seconds = self.cpu_seconds = 0.0

    def after(self, step: int) -> None:
        """To be called when ``step`` has been made."""
        if step not in (self._given.warm, self._given.steps):
            return
        if self._given.device.type == "cuda":
            torch.cuda.synchronize()
        if step == self._given.steps:
            self.seconds = time.perf_counter() - self._begun
            self.cpu_seconds = time.process_time() - self._cpu_begun
            if self._counted:
                self._counted.__exit__(None, None, None)
        else:
            if self._given.count:
                self._counted = TensorBytes()
                self._counted.__enter__()
            self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    def result(self, tokens: int, loss: float) -> dict[str, float]:
        """``tokens`` were in the timed steps. Bytes: the largest resident size over that before the model, of a card
        what torch had allocated; and, where counted, the tensors of a step beside weights and moments."""
        if self._given.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            memory = int(peak[1]) * 1024 - self._held if peak else 0
        counted = self._counted.peak if self._counted else 0
        return {
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "tokens": tokens, "memory": memory,
            "counted": counted, "loss": loss,
        }  # fmt: skip


def ours(given: Specification) -> dict[str, float]:
    """``fine_tune``, which is what a worker of ``train sft`` does."""
    from workloads.fine_tune import fine_tune
    from workloads.prepared import batches_of

    class Steps:
        def log(self, step: int, **values: float) -> None:
            watch.after(step)

        def checkpoint(self, *_: Any) -> None: ...

    config, rows = given.config, given.rows
    result = Path(given.folder) / "result"
    watch = Watch(given)
    done = fine_tune(config, rows, [], device=given.device, events=Steps(), result=result)
    batches = batches_of(rows, config)
    tokens = sum(len(row.ids) for step in range(given.warm, given.steps) for row in batches[step])
    return watch.result(tokens, done.history.train[-1][1])


def trainer(given: Specification) -> dict[str, float]:
    """TRL's SFTTrainer or, where ``side`` says so, Transformers' own Trainer; by its name with a few options."""
    from datasets import Dataset
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.after(state.global_step)
            seen[state.global_step] = state.num_input_tokens_seen

    config, rows = given.config, given.rows
    seen: dict[int, int] = {}
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    plain, grouped = (word in given.side for word in ("transformers", "grouped"))
    share = given.batch if given.singly else 1
    arguments: dict[str, Any] = {
        "output_dir": f"{given.folder}/result", "max_steps": given.steps, "report_to": [], "save_strategy": "no",
        "per_device_train_batch_size": given.batch // share, "gradient_accumulation_steps": share,
        "learning_rate": config.learning_rate, "logging_steps": given.warm, "disable_tqdm": True, "seed": config.seed,
        "use_cpu": given.device.type == "cpu", "bf16": given.device.type == "cuda", "torch_compile": given.compile,
        "gradient_checkpointing": given.recompute, "max_grad_norm": config.gradient_clip, "adam_beta2": 0.95,
        "include_num_input_tokens_seen": "non_padding", "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length" if grouped else "random",
    }  # fmt: skip
    watch = Watch(given)
    model, adapter = _model(given, config)
    if plain:
        if given.packing:  # it has no packing of its own: it gets ours
            from workloads.prepared import batches_of

            rows = [row for batch in batches_of(rows, config).first_epoch() for row in batch]
        random.Random(config.seed).shuffle(rows)
        made = Trainer(
            model, TrainingArguments(remove_unused_columns=False, **arguments), data_collator=_together,
            train_dataset=rows, processing_class=tokenizer, callbacks=[Steps()],
        )  # fmt: skip
    else:
        columns = {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}
        made = SFTTrainer(
            model, SFTConfig(packing=given.packing, max_length=given.max_length, **arguments),
            train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, callbacks=[Steps()],
            peft_config=adapter,
        )  # fmt: skip
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return watch.result(seen[given.steps] - seen[given.warm], losses[-1])


def _model(given: Specification, config: Any) -> tuple[Any, Any]:
    """The model and what is still to be put on it: an adapter is TRL's own business, and nobody else's."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if "unsloth" in given.side:
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(config.base, given.max_length, torch.bfloat16, load_in_4bit=False)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = FastLanguageModel.get_peft_model(
            model, r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules=names, lora_dropout=0,
            use_gradient_checkpointing=given.recompute,
        )  # fmt: skip
        return model, None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.base, dtype=getattr(torch, config.compute_dtype))
    if given.method == "full":
        return model, None
    return (get_peft_model(model, adapter), None) if "transformers" in given.side else (model, adapter)


def _together(rows: list[Row]) -> dict[str, Any]:
    made = collate(rows, torch.device("cpu"))
    return {**made.inputs, "labels": made.labels_BT}


def main(file: Path) -> None:
    """Run the side, and write what was measured."""
    given = Specification(**json.loads(file.read_text()))
    if "unsloth" in given.side:
        import unsloth  # noqa: F401  it patches what is imported after it
    import peft  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    measured = ours(given) if given.side.startswith("workbench") else trainer(given)
    file.with_suffix(".result").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
