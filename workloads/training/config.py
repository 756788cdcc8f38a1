"""The keys that training commands share; no heavy import, because the command line reads it."""

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from profiling.step_profiler import TraceSteps
from workbench.config import Config
from workbench.resources import Placed
from workloads.sources import ModelSource

LOSS_CHUNK = 512
"""Target tokens whose logits exist at once, where nothing else is said."""

Strategy = Literal["fsdp2", "fsdp2-offload", "zero2", "zero3", "single"]
"""Who shards what over the workers."""

PreferenceKind = Literal["sigmoid", "ipo"]
"""Losses of preference pairs."""


Kernel = Literal["auto", "bitsandbytes", "torch", "triton"]
"""What undoes NF4: bitsandbytes' own code, plain PyTorch, or one Triton kernel; auto: by the device."""


class AdapterConfig(Config):
    """A LoRA adapter: what is added to each targeted linear layer."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32, gt=0, allow_inf_nan=False, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | list[str] = Field("all-linear", description="layer names, or all-linear: all but the head")

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("no layer is named: give adapter.targets=all-linear, or names such as [q_proj, v_proj]")
        return targets


class EarlyStoppingConfig(Config):
    """When training ends before its last step: the held-out loss no longer falls."""

    patience: int = Field(3, ge=1, description="looks at the held-out loss without a new lowest one")
    min_delta: float = Field(0.0, ge=0, description="a loss counts as lower if it is by more than this")


class DivergenceConfig(Config):
    """When training is stopped as hopeless, beside a loss or gradient that is no number."""

    factor: float = Field(3.0, gt=1, description="times the median loss of the steps before")
    steps: int = Field(10, ge=1, description="steps in a row that must be over it")
    window: int = Field(100, ge=1, description="steps that the median is taken of")


class DistillConfig(Config):
    """A larger model whose distribution over the next token is learned."""

    teacher: ModelSource = Field(description="model folder or hub name, with the tokenizer of the model that learns")
    weight: float = Field(0.5, gt=0, le=1, description="share of the teacher in the loss; the text has the rest")
    temperature: float = Field(2.0, gt=0, description="softens both distributions")
    top_k: int = Field(0, ge=0, description="likeliest tokens that are told apart, all others as one; 0: every token")


class TrainingConfig(Placed):
    """How long, how fast and on what: the loop of ``loop.py`` reads these keys and no others."""

    several: ClassVar[bool] = True
    free: ClassVar[set[str]] = {
        "resources", "workers", "least_workers", "cpus_per_worker", "gpus_per_worker", "strategy", "dtype",
        "gradient_checkpointing", "compile",
        "micro_batch_size", "loss_chunk", "max_failures", "log_every", "validate_every", "checkpoint_every",
        "keep_last", "keep_best", "early_stopping", "divergence", "sample_every", "sample_prompts", "sample_tokens",
        "resume", "trace",
    }  # fmt: skip
    """Keys that say where and how a run runs, not what it learns: a resume may give other values."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences in one step, over all workers")
    micro_batch_size: int = Field(0, ge=0, description="sequences in one forward pass of a worker; 0: its whole share")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak of the schedule")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    final_learning_rate: float = Field(0.05, ge=0, le=1, description="end of the cosine, as a share of the peak")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's decoupled weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the uniform distribution in the target")
    z_loss: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the squared log of the softmax's normaliser; 1e-4 is usual",
    )
    loss_chunk: int = Field(LOSS_CHUNK, ge=0, description="target tokens whose logits exist at once; 0: all")
    log_every: int = Field(10, ge=1, description="steps between two rows of metrics")
    validate_every: int = Field(50, ge=0, description="steps between two validation losses; 0: only at the end")
    checkpoint_every: int = Field(100, ge=0, description="steps between two checkpoints; 0: none")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_best: bool = Field(True, description="make and keep a checkpoint where the held-out loss is the lowest so far")
    early_stopping: EarlyStoppingConfig | None = Field(None, description="end when the held-out loss stops falling")
    divergence: DivergenceConfig | None = Field(DivergenceConfig(), description="what is no training any more")
    resume: str | None = Field(None, description="a run that was cut short, to go on from its last checkpoint")
    trace: TraceSteps | None = Field(None, description="steps to trace, {first: 3, last: 5}, for 'profile trace'")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="initial weights, order of the data, dropout")

    workers: int = Field(2, ge=1, description="Ray Train workers: one process and one card (or core) each")
    least_workers: int | None = Field(
        None, ge=1, description="go on with as few while a host is away, and with more when it is back; default: wait"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that Ray reserves for a worker")
    gpus_per_worker: float = Field(0.0, ge=0, le=1, description="0: train on the CPU; 1: one CUDA card a worker")
    strategy: Strategy = Field(
        "fsdp2", description="fsdp2 shards over the workers, fsdp2-offload keeps the shards in host memory; zero2 and "
        "zero3 are DeepSpeed's; single is one worker"
    )  # fmt: skip
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the computation; auto: bfloat16 on CUDA, float32 on a CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(False, description="compile the decoder layers; the first steps take minutes")
    max_failures: int = Field(2, ge=0, description="times that a dead worker is replaced, from the last checkpoint")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.resources is not None and isinstance(self.resources.gpus, int):
            raise ValueError(f"a worker takes one card: give workers={self.resources.gpus} and resources.gpu=any")
        if self.strategy == "single" and self.workers != 1:
            raise ValueError(f"strategy single has one worker, not {self.workers}: give workers=1 or strategy=fsdp2")
        if self.strategy == "zero3" and self.compile:
            raise ValueError(
                "zero3 gathers weights in the middle of a layer, where compiled code cannot wait for them: give "
                "compile=false, or strategy=fsdp2 or zero2"
            )
        if self.trace is not None and self.trace.last > self.steps:
            raise ValueError(f"trace.last {self.trace.last} is beyond the {self.steps} steps")
        if self.trace is not None and self.zero_stage:
            raise ValueError("trace follows PyTorch's own optimizer: give strategy=fsdp2, or no trace")
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} does not divide over {self.workers} workers")
        if self.least_workers is not None:
            self._check_elastic(self.least_workers)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of {self.steps} steps")
        if self.early_stopping is not None and not (self.keep_best and self.validate_every):
            raise ValueError("early_stopping ends with the best weights: it needs keep_best=true and validate_every")
        return self

    def _check_elastic(self, least: int) -> None:
        if least > self.workers:
            raise ValueError(f"least_workers {least} is more than workers {self.workers}")
        shared = math.lcm(*range(least, self.workers + 1))
        if self.batch_size % shared:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {least} to {self.workers} workers alike: give a "
                f"multiple of {shared}, or another least_workers"
            )

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage of ZeRO; 0 for the strategies of PyTorch."""
        return {"zero2": 2, "zero3": 3}.get(self.strategy, 0)

    @property
    def compute_dtype(self) -> str:
        """``dtype`` with auto resolved. Only CUDA cards and few CPUs are faster in bfloat16: an x86 CPU without
        AVX512-BF16 emulates it at a twentieth of the speed of float32."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.gpus_per_worker else "float32"


class DistillableConfig(TrainingConfig):
    """Of training that may have a teacher."""

    distill: DistillConfig | None = Field(None, description="learn from a larger model as well")

    @model_validator(mode="after")
    def _one_softening(self) -> "DistillableConfig":
        if self.distill is not None and (self.label_smoothing or self.z_loss):
            raise ValueError("distill softens the targets by its teacher: give label_smoothing=0 and z_loss=0")
        return self
