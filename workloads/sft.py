"""Fine-tune a model on instructions: QLoRA, LoRA or all weights, sharded over workers.

    workbench train sft configs/demo/sft.yaml adapter.rank=32

Ray Train starts the workers, FSDP2 shards the (4-bit) base over them, and ``training/loop.py`` trains the adapter on
the answers alone. A dead worker is replaced and training goes on from the last checkpoint. Artifacts: ``adapter/``,
``merged/`` (the base with the adapter added, for Transformers and vLLM), ``test.jsonl`` (held out from all of it).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.runs import Run, Summary
from workloads.chat_templates import end_generation
from workloads.instructions import SPLIT_FILE, refuse_other_split
from workloads.progress_report import add_progress, held_out_loss, storage_table, usual_speed
from workloads.sources import CHEMISTRY, DataSource, ModelSource, TemplateSource, check_model
from workloads.training.config import AdapterConfig, DistillableConfig, Kernel, TrainingConfig

if TYPE_CHECKING:
    from workloads.plan import RunPlan
    from workloads.training.trainable import Coverage


class TuningConfig(TrainingConfig):
    """The keys that ``train sft`` and ``train dpo`` share."""

    base: ModelSource = Field(description="model folder or hub name")
    chat_template: TemplateSource = Field(
        "", description="alpaca, plain, chatml, llama3 or a Jinja file; empty: the base's"
    )
    split_seed: int = Field(0, description="which molecules, or rows, are held out")
    method: Literal["lora", "full"] = Field("lora", description="train an adapter, or all weights")
    quantization: Literal["nf4", "none"] = Field("nf4", description="of the frozen base; nf4 with lora is QLoRA")
    nf4_kernel: Kernel = Field("auto", description="what undoes NF4; auto: triton on CUDA, bitsandbytes on a CPU")
    adapter: AdapterConfig = Field(AdapterConfig(), description="the LoRA adapter")
    max_length: int = Field(512, ge=8, description="tokens of a sequence; a longer row loses its beginning")
    validation_rows: int = Field(128, ge=1, description="held-out rows whose loss is watched")
    sample_every: int = Field(0, ge=0, description="steps between two looks at what the model answers; 0: none")
    sample_prompts: int = Field(4, ge=1, description="held-out rows that it is asked")
    sample_tokens: int = Field(48, ge=1, description="tokens of a sampled answer at most")

    @model_validator(mode="after")
    def _trainable(self) -> "TuningConfig":
        if self.method == "full" and self.quantization != "none":
            raise ValueError("4-bit weights cannot be trained: give quantization=none with method=full, or method=lora")
        return self


class SftConfig(TuningConfig, DistillableConfig):
    """Config of ``train sft``; also what a sweep varies."""

    free: ClassVar[set[str]] = TrainingConfig.free | {"streaming"}

    data: DataSource = Field(
        CHEMISTRY, description="chemistry, or files of Alpaca, ShareGPT or chat rows: JSONL, JSON, Parquet"
    )
    train_on: Literal["answers", "last_answer", "all"] = Field("answers", description="which tokens are learned")
    packing: bool = Field(False, description="several rows in a sequence of max_length, which do not see each other")
    streaming: bool = Field(False, description="tokenize rows while training runs, on CPUs that the workers leave free")


def check(config: SftConfig) -> None:
    """Raise UserError for a base that is not to be had, cannot be trained or has seen the test set, and for unreadable
    rows."""
    from workloads.training.resume import check_resume

    check_resume(config)
    check_model("base", config.base)
    coverage(config)
    if config.packing:
        from workloads.training.packing import refuse_leaking

        refuse_leaking(config.base)
    refuse_other_split(config.base, config.data, config.split_seed)
    if config.distill is not None:
        from workloads.chat_templates import load_tokenizer
        from workloads.training.distillation import check_teacher

        refuse_other_split(config.distill.teacher, config.data, config.split_seed)
        check_teacher(config.distill, load_tokenizer(config.base, config.chat_template), config.max_length)
    from workloads.prepared import look

    look(config)


def coverage(config: TuningConfig) -> "Coverage":
    """What of the base is adapted and what is quantised. Raises UserError for what cannot be trained so."""
    from workloads.training.trainable import examine

    return examine(config.base, config.method, config.quantization, config.adapter, config.compute_dtype)


def plan(config: SftConfig) -> "RunPlan":
    """What each card will have to hold, for ``--plan``. Raises UserError for a base that cannot be trained so."""
    from workloads.plan import plan_run

    check_model("base", config.base)
    coverage(config)
    return plan_run(config)


def run(config: SftConfig, run: Run) -> Summary:
    """Prepare the rows, train on Ray Train workers, merge, and report."""
    from cluster.nodes import member_nodes
    from workloads.plan import check_memory
    from workloads.training.ray_train import check_placement, fit

    check(config)
    check_placement(config)
    needed = check_memory(config, member_nodes(), run.say)
    covered = coverage(config)
    run.say(covered.text())
    from workloads.fine_tune import tuning_worker
    from workloads.prepared import close_rows, open_rows, prepare, rows_table

    rows = prepare(config, run)
    stream = open_rows(config, run) if config.streaming else None

    result = run.artifact("adapter" if config.method == "lora" else "merged")
    payload = {
        "config": config, "result": str(result), "questions": rows.questions,
        "train": str(rows.train), "validation": str(rows.validation), "needed": needed, "stream": stream,
    }  # fmt: skip
    done = fit(tuning_worker, payload, config, run)
    if stream is not None:
        rows = close_rows(config, rows, stream, run)
    if config.method == "lora":
        run.say("merging the adapter into the base")
        write_merged(config.base, result, run.artifact("merged"), config.compute_dtype)
    else:
        end_generation(result)
        keep_split_seed(config.base, result)
    report(config, run, rows.facts, rows_table(rows), done, covered)
    _, validation_loss = held_out_loss(run, done)
    return {
        "loss": done["train"][-1][1],
        "validation_loss": validation_loss,
        "best_validation_loss": done["best"][1],
        "best_step": done["best"][0],
        "steps": done["steps"],
        "tokens_per_second": usual_speed(run.folder),
        "trained_parameters": done["trained_parameters"],
        **rows.summary,
        "resumed_from": done["resumed_from"],
        "workers": config.workers,
        "bytes_of_rank_0": done["storage"][0]["local"],
        "molecules_shared": rows.facts.get("molecules_shared", 0),
        "scaffolds_shared": rows.facts.get("scaffolds_shared", 0),
    }


def write_merged(base: str, adapter: Path, folder: Path, dtype: str) -> None:
    """Merge the adapter into the base at full precision, and mark the result with the base's chemistry split."""
    from transformers import AutoTokenizer

    from workloads.training.adapters import merge

    merge(base, adapter, folder, AutoTokenizer.from_pretrained(adapter), dtype)  # with the template it was tuned with
    end_generation(folder)
    keep_split_seed(base, folder)


def keep_split_seed(base: str, folder: Path) -> None:
    """Carry the note of which chemistry split was seen from a base to what was made of it."""
    if (Path(base) / SPLIT_FILE).is_file():
        shutil.copy(Path(base) / SPLIT_FILE, folder / SPLIT_FILE)


def report(
    config: SftConfig,
    run: Run,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    done: dict[str, Any],
    covered: "Coverage",
) -> None:
    """The curves, the data and its split check, and what each worker held."""
    from workloads.figures import loss_curves

    run.report.heading("Training", f"{config.method} on {config.base}, base in {config.quantization}")
    run.report.figure(
        "Loss on the answers", loss_curves(done["train"], done["validation"]), "Nats per token; lower is better."
    )
    add_progress(run)
    learned = {"answers": "every answer", "last_answer": "the last answer of each row", "all": "every token"}
    run.report.heading("Data", f"Learned: {learned[config.train_on]}.")
    run.report.table("Where the rows came from", [{"fact": key, "count": value} for key, value in facts.items()])
    run.report.table("What became of the training rows", rows)
    if config.data == CHEMISTRY:
        run.report.text(
            "Is anything in two parts?",
            f"Recomputed from the SMILES: {facts['molecules_shared']} molecules and {facts['scaffolds_shared']} "
            "Murcko scaffolds are in more than one of train, validation and test.",
        )
    run.report.text("What is trained, and what is quantised", covered.text())
    run.report.table(*storage_table(done["storage"]))
    run.report.links("Artifacts", {"adapter and merged model": "artifacts/", "held-out rows": "artifacts/test.jsonl"})
