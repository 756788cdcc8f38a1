"""Tune a model on preferences: of two answers to a prompt, the one that was chosen becomes the likelier.

    workbench train dpo configs/train/dpo.yaml beta=0.05

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) by the workers and the loop of ``train sft``:
the (4-bit) base, sharded by FSDP2, is the reference while its adapter is off, so that there is one model in memory.
Artifacts: ``adapter/``, ``merged/`` (the base with the adapter added), ``test.jsonl`` (held out from all of it).
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from workbench.runs import Run, Summary
from workloads.progress_report import add_progress, held_out_loss, storage_table, usual_speed
from workloads.sft import TuningConfig, coverage, write_merged
from workloads.sources import FileOrSet, check_model
from workloads.training.config import PreferenceKind

if TYPE_CHECKING:
    from workloads.plan import RunPlan
    from workloads.prepared import Prepared
    from workloads.training.trainable import Coverage

Files = Annotated[list[FileOrSet], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]


class DpoConfig(TuningConfig):
    """Config of ``train dpo``."""

    data: Files = Field(min_length=1, description="files or hf: sets of prompt, chosen and rejected")
    method: Literal["lora", "full"] = Field("lora", description="lora: the base, its adapter off, is the reference")
    loss: PreferenceKind = Field("sigmoid", description="sigmoid: DPO's; ipo: to a difference of 1 / (2 beta)")
    beta: float = Field(0.1, gt=0, description="pull towards the reference: the less, the further answers move")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs labelled the wrong way round")
    sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answer's cross-entropy per token")
    batch_size: int = Field(16, ge=1, description="pairs in one step, over all workers")
    micro_batch_size: int = Field(0, ge=0, description="pairs in one forward pass of a worker; 0: its whole share")
    learning_rate: float = Field(2e-5, gt=0, allow_inf_nan=False, description="peak of the schedule")
    max_length: int = Field(1024, ge=8, description="tokens of a prompt and an answer; over it the prompt is cut")

    @field_validator("method")
    @classmethod
    def _adapter(cls, method: str) -> str:
        if method == "full":
            raise ValueError("dpo trains an adapter, without which the base is the reference: give method=lora")
        return method

    @model_validator(mode="after")
    def _of_pairs(self) -> "DpoConfig":
        if self.z_loss:
            raise ValueError("z_loss is a term of cross-entropy: give z_loss=0")
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing is of the sigmoid loss: give label_smoothing=0 with loss=ipo")
        return self


def check(config: DpoConfig) -> None:
    """Raise UserError for a base that is not to be had or cannot be trained, and for unreadable rows."""
    from workloads.prepared import look
    from workloads.training.resume import check_resume

    check_resume(config)
    check_model("base", config.base)
    coverage(config)
    look(config)


def plan(config: DpoConfig) -> "RunPlan":
    """What each card will have to hold, for ``--plan``. Raises UserError for a base that cannot be trained so."""
    from workloads.plan import plan_run

    check_model("base", config.base)
    coverage(config)
    return plan_run(config)


def run(config: DpoConfig, run: Run) -> Summary:
    """Prepare the pairs, train on Ray Train workers, merge, and report."""
    from cluster.nodes import member_nodes
    from workloads.plan import check_memory
    from workloads.training.ray_train import check_placement, fit

    check(config)
    check_placement(config)
    needed = check_memory(config, member_nodes(), run.say)
    covered = coverage(config)
    run.say(covered.text())
    from workloads.fine_tune import tuning_worker
    from workloads.prepared import prepare

    rows = prepare(config, run)
    result = run.artifact("adapter")
    payload = {
        "config": config, "result": str(result), "questions": rows.questions,
        "train": str(rows.train), "validation": str(rows.validation), "needed": needed,
    }  # fmt: skip
    done = fit(tuning_worker, payload, config, run)
    run.say("merging the adapter into the base")
    write_merged(config.base, result, run.artifact("merged"), config.compute_dtype)
    report(config, run, rows, done, covered)
    step, loss = held_out_loss(run, done)
    looks = [row for row in _metrics(run) if row["step"] == step and "validation_margin" in row]
    held_out = looks[-1] if looks else {}  # a full disk
    return {
        "loss": done["train"][-1][1],
        "validation_loss": loss,
        "validation_accuracy": held_out.get("validation_accuracy"),
        "validation_margin": held_out.get("validation_margin"),
        "best_validation_loss": done["best"][1],
        "best_step": done["best"][0],
        "steps": done["steps"],
        "tokens_per_second": usual_speed(run.folder),
        "trained_parameters": done["trained_parameters"],
        **rows.summary,
        "alike": rows.counts.alike,
        "resumed_from": done["resumed_from"],
        "workers": config.workers,
        "bytes_of_rank_0": done["storage"][0]["local"],
    }


def report(config: DpoConfig, run: Run, rows: "Prepared", done: dict[str, Any], covered: "Coverage") -> None:
    """The loss, what became of the rewards, the data, and what each worker held."""
    from workloads.figures import loss_curves, preference_curves
    from workloads.prepared import rows_table

    run.report.heading("Training", f"{config.loss} with beta {config.beta:g} on {config.base} in {config.quantization}")
    run.report.figure(
        "Loss of a pair", loss_curves(done["train"], done["validation"], "of a pair"),
        "Lower is better; a model that prefers nothing has ln 2 = 0.693 (sigmoid) or 1 / (4 beta^2) (ipo).",
    )  # fmt: skip
    run.report.figure(
        "Preferences", preference_curves(_metrics(run)),
        "Reward: beta times the log-ratio of an answer under the adapted model and the base. Margin: chosen less "
        "rejected. Accuracy: pairs with a margin over 0. Log-probability: of a whole answer, in nats. Where both "
        "log-probabilities fall, a smaller learning_rate or an sft_weight holds the chosen answer up.",
    )  # fmt: skip
    add_progress(run)
    run.report.heading("Data")
    run.report.table("Where the rows came from", [{"fact": key, "count": value} for key, value in rows.facts.items()])
    run.report.table("What became of the training rows", rows_table(rows), "A row is a pair: tokens of both.")
    run.report.text("What is trained, and what is quantised", covered.text())
    run.report.table(*storage_table(done["storage"]))
    run.report.links("Artifacts", {"adapter and merged model": "artifacts/", "held-out pairs": "artifacts/test.jsonl"})


def _metrics(run: Run) -> list[dict[str, Any]]:
    from workbench.tracking import read_metrics

    return read_metrics(run.folder)
