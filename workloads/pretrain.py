"""Train a small decoder-only Transformer from scratch, with a tokenizer of its own.

    workbench train pretrain configs/demo/pretrain.yaml steps=400

The architecture is Llama's (``training/transformer.py``), which Transformers and vLLM load. The corpus is what
RDKit computes about the training molecules of the chemistry workload, and documents of a ``data audit`` run.
Artifact: ``model/``, weights, tokenizer and chat template.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from workbench.config import Config, InputPath
from workbench.files import write_json
from workbench.runs import Run, Summary
from workloads.corpus import document_files, documents_version
from workloads.instructions import SPLIT_FILE, refuse_other_split
from workloads.progress_report import add_progress, held_out_loss, usual_speed
from workloads.sources import CHEMISTRY
from workloads.training.config import DistillableConfig

if TYPE_CHECKING:
    from workloads.plan import RunPlan


class ArchitectureConfig(Config):
    """Sizes of the Transformer."""

    hidden_size: int = Field(192, ge=32, description="width")
    layers: int = Field(4, ge=1, description="decoder layers")
    head_size: int = Field(
        32, ge=2, multiple_of=2, description="width of an attention head; vLLM's CPU kernels take 32, 64, 96, 128, ..."
    )
    key_value_heads: int = Field(0, ge=0, description="heads of keys and values; 0: as many as of queries")
    mlp_size: int = Field(512, ge=32, description="width of the SwiGLU layer")
    context: int = Field(2048, ge=64, description="largest position")
    tie_embeddings: bool = Field(True, description="embedding and head are one weight")
    initial_range: float = Field(
        0.05,
        gt=0,
        description="deviation of the new weights; Transformers' 0.02 learns slower at widths of a few hundred",
    )

    @model_validator(mode="after")
    def _heads(self) -> "ArchitectureConfig":
        if self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of head_size {self.head_size}")
        heads = self.hidden_size // self.head_size
        if self.key_value_heads and heads % self.key_value_heads:
            raise ValueError(f"{heads} heads of queries do not divide over key_value_heads {self.key_value_heads}")
        return self


class PretrainConfig(DistillableConfig):
    """Config of ``train pretrain``."""

    model: ArchitectureConfig = Field(ArchitectureConfig(), description="sizes of the model")
    vocabulary: int = Field(
        1024, ge=300, description="tokens of the tokenizer, bytes and special ones included; with distill the teacher's"
    )
    max_length: int = Field(
        256, ge=16, description="tokens of a training sequence at most; longer texts are cut into pieces"
    )
    documents: InputPath | None = Field(
        None, description="Parquet (text, keep) of a data audit run; none: chemistry only"
    )
    document_share: float = Field(0.1, ge=0, lt=1, description="share of the training tokens that documents give")
    split_seed: int = Field(0, description="which molecules are held out: not one of them is trained on")
    chemistry_copies: int = Field(0, ge=0, description="records of each molecule; 0: as many as the steps can use")
    randomised: float = Field(0.1, ge=0, le=1, description="share of the records that spell their molecule at random")

    @model_validator(mode="after")
    def _as_it_trains(self) -> "PretrainConfig":
        if self.max_length > self.model.context:
            raise ValueError(
                f"max_length {self.max_length} is beyond model.context {self.model.context}: give "
                f"max_length={self.model.context}, or model.context={self.max_length}"
            )
        if self.strategy == "single" and self.compute_dtype == "bfloat16":
            raise ValueError(
                "new weights are in float32, and so is what strategy single computes: give dtype=float32, or "
                "strategy=fsdp2, which computes in bfloat16 on one worker too"
            )
        return self


def check(config: PretrainConfig) -> None:
    """Raise UserError for documents that are not Parquet with a column ``text``, a run that cannot be resumed, and a
    teacher that cannot teach or has seen the molecules that are held out."""
    from workloads.training.resume import check_resume

    check_resume(config)
    if config.documents:
        document_files(config.documents)
    if config.distill is not None:
        from workloads.training.distillation import check_teacher

        check_teacher(config.distill, None, config.max_length)
        refuse_other_split(config.distill.teacher, CHEMISTRY, config.split_seed)


def plan(config: PretrainConfig) -> "RunPlan":
    """What each card will have to hold, for ``--plan``."""
    from workloads.plan import plan_run

    return plan_run(config)


def run(config: PretrainConfig, run: Run) -> Summary:
    """Build corpus and tokenizer, train on Ray Train workers, and report."""
    from cluster.nodes import member_nodes
    from workloads.plan import check_memory
    from workloads.training.ray_train import check_placement, fit

    check_placement(config)
    needed = check_memory(config, member_nodes(), run.say)
    if config.documents:
        version = documents_version(config.documents)
        run.input("documents", path=config.documents, **({"version": version} if version else {}))
    from workloads.pretraining import build_corpus, pretrain_worker

    model = run.artifact("model")
    corpus = build_corpus(config, run, model)
    run.say(f"training {config.steps} steps of {config.batch_size} sequences")
    payload = {"config": config, **corpus["files"], "result": str(model), "needed": needed}
    done = fit(pretrain_worker, payload, config, run)
    write_json(model / SPLIT_FILE, {"split_seed": config.split_seed})
    report(config, run, corpus["facts"], done)
    _, validation_loss = held_out_loss(run, done)
    return {
        "parameters": done["parameters"],
        "tokens": done["tokens"],
        "tokens_per_second": usual_speed(run.folder),
        "steps": done["steps"],
        "loss": done["train"][-1][1],
        "validation_loss": validation_loss,
        "vocabulary": corpus["facts"]["vocabulary"],
        "resumed_from": done["resumed_from"],
    }


def report(config: PretrainConfig, run: Run, facts: dict[str, Any], done: dict[str, Any]) -> None:
    """The loss curve, the corpus, and what the model writes."""
    from workloads.figures import loss_curves

    run.report.heading("Training", f"{done['parameters']:,} parameters, {config.workers} workers")
    run.report.figure(
        "Loss", loss_curves(done["train"], done["validation"]),
        "Nats per token; lower is better. Held out: records of molecules in the validation part.",
    )  # fmt: skip
    add_progress(run)
    run.report.table(
        "Samples",
        done["samples"],
        "Greedy continuations; the truth is RDKit's. The molecules are from the validation part.",
    )
    run.report.heading("Corpus")
    run.report.table("What it is made of", [{"fact": key, "value": value} for key, value in facts.items()])
    run.report.text("A record", str(Path(run.artifact("record.txt")).read_text()))
    run.report.links("Artifacts", {"model and tokenizer": "artifacts/model/"})
