"""The config of a sweep: a workload's config, a space around it, what is measured, and what it may cost."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tune.conditions import Condition
from tune.space import Range
from tune.workload import OF_A_PLACE, WORKLOADS, Workload
from workbench.config import Config
from workbench.resources import ResourceRequest
from workloads.dpo import DpoConfig
from workloads.pretrain import PretrainConfig
from workloads.sft import SftConfig

Direction = Literal["min", "max"]


class SchedulerConfig(Config):
    """When a trial that falls behind is stopped."""

    kind: Literal["asha", "median", "pbt", "none"] = Field(
        "asha",
        description="asha: outside the best share at a rung; median: worse than the median trial; pbt: among the "
        "worst, and one like a better one goes on in its place; none",
    )
    grace_steps: int = Field(50, ge=1, description="no trial is stopped before this step")
    reduction_factor: float = Field(2.0, gt=1, description="asha: one in this many goes on at each rung")
    perturb_steps: int = Field(50, ge=1, description="pbt: steps between two comparisons")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share that is behind, and share that is copied")
    spare: float = Field(
        0.1, ge=0, le=1, description="share of stop decisions that are ignored, to see what stopping loses"
    )


class BudgetConfig(Config):
    """What ends a sweep: whichever comes first."""

    trials: int | None = Field(None, ge=1, description="trials in all")
    hours: float | None = Field(None, gt=0, description="hours on the clock, over all sessions")
    gpu_hours: float | None = Field(None, gt=0, description="hours of cards, all trials together")
    target: float | None = Field(None, description="value of the first metric that is good enough")

    @model_validator(mode="after")
    def _finite(self) -> "BudgetConfig":
        if not self.model_dump(exclude_none=True):
            raise ValueError("a sweep has an end: give budget.trials, budget.hours, budget.gpu_hours or budget.target")
        return self


class RepeatConfig(Config):
    """At the end the best trials run again with other seeds: how sure is their order?"""

    top: int = Field(0, ge=0, description="trials that are repeated; 0: none")
    seeds: int = Field(3, ge=2, description="seeds of each, the first one's included")


class SweepConfig(Config):
    """Config of ``tune run``."""

    workload: Literal["train sft", "train dpo", "train pretrain"] = Field(
        "train sft", description="the command that a trial runs"
    )
    config: SftConfig | DpoConfig | PretrainConfig = Field(description="keys of the workload that all trials share")
    space: dict[str, Range] = Field({}, description="dotted key: {choice|uniform|loguniform|int: [...], when: ...}")
    constraints: list[str] = Field([], description="conditions that every trial meets: adapter.alpha >= adapter.rank")
    function: str = Field("", description="instead of space: module:name, from an Optuna trial to overrides")
    metrics: dict[str, Direction] = Field(
        {"validation_loss": "min"}, min_length=1, description="what is measured; trials are stopped by the first"
    )
    budget: BudgetConfig = Field(BudgetConfig(trials=4), description="what ends the sweep")
    searcher: Literal["spread", "grid", "random", "tpe"] = Field(
        "spread", description="spread: a Latin hypercube; tpe: Optuna's, which learns from the trials before"
    )
    concurrent: int = Field(2, ge=1, description="trials at a time, where the cluster has room")
    resources: ResourceRequest | None = Field(None, description="what a trial gets; the same as config.resources")
    scheduler: SchedulerConfig = Field(SchedulerConfig(), description="when a trial is stopped")
    repeat: RepeatConfig = Field(RepeatConfig(), description="the best trials again, with other seeds")
    retries: int = Field(2, ge=0, description="times that a trial whose process died goes on from its last checkpoint")
    grace_seconds: int = Field(120, ge=1, description="time that a stopped trial has for its checkpoint")
    seed: int = Field(0, description="which points are drawn, and which stop decisions are ignored")

    @property
    def of(self) -> Workload:
        """The workload by its name."""
        return WORKLOADS[self.workload]

    @property
    def metric(self) -> str:
        """What trials are compared by while they run."""
        return next(iter(self.metrics))

    @property
    def minimises(self) -> bool:
        """Whether less of it is better."""
        return self.metrics[self.metric] == "min"

    @field_validator("config", mode="wrap")
    @classmethod
    def _of_the_workload(cls, value: Any, _: Callable[[Any], Any], info: ValidationInfo) -> Any:
        """By the schema of the command; a trial is one process unless ``workers`` says more."""
        if "workload" not in info.data:
            return value  # it is refused already
        schema = WORKLOADS[info.data["workload"]].schema
        if isinstance(value, dict) and value.get("workers", 1) == 1:
            value = {"workers": 1, "strategy": "single", **value}
        return schema.model_validate(value, context=info.context)

    @field_validator("constraints")
    @classmethod
    def _parsed(cls, texts: list[str]) -> list[str]:
        for text in texts:
            Condition.parse(text)
        return texts

    @model_validator(mode="after")
    def _placed(self) -> "SweepConfig":
        if self.resources is not None and self.config.resources != self.resources:
            if self.config.resources is not None:
                raise ValueError("resources and config.resources differ: give one of them")
            self.__dict__["config"] = self.config.asking_for(self.resources)
        return self

    @model_validator(mode="after")
    def _searchable(self) -> "SweepConfig":
        if bool(self.space) == bool(self.function):
            raise ValueError("the space is empty: give space, or function=module:name" if not self.space else
                             "space and function exclude each other: give one of them")  # fmt: skip
        if self.function and self.searcher not in ("random", "tpe"):
            raise ValueError(f"searcher {self.searcher} needs a space: give searcher=tpe or random with function")
        if self.repeat.top and ("seed" in self.space or self.function):
            raise ValueError("repeat sets the seed: take it out of the space" if not self.function else
                             "repeat knows the points of a space, not of a function: give repeat.top=0")  # fmt: skip
        if self.repeat.top and self.budget.trials is None and any(each.every is None for each in self.space.values()):
            raise ValueError("repeat comes after the last trial, which this space never has: give budget.trials")
        if placing := [key for key in self.space if key.partition(".")[0] in OF_A_PLACE]:
            raise ValueError(
                f"space: '{placing[0]}' says where a trial runs, the same for all: set config.{placing[0]}"
            )
        fixed = [key for key in self.space if key.partition(".")[0] in self.of.shared]
        if fixed:
            raise ValueError(
                f"space: '{fixed[0]}' is shared by all trials, whose rows are dealt once: set config.{fixed[0]}"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> "SweepConfig":
        every, rule = self.config.validate_every, self.scheduler
        first = rule.perturb_steps if rule.kind == "pbt" else rule.grace_steps
        if rule.kind != "none" and (not every or every > first):
            raise ValueError(
                f"trials are compared by {self.metric}, at step {first} first: "
                f"config.validate_every is {every}, give 1 to {first}"
            )
        return self

    @model_validator(mode="after")
    def _bounded(self) -> "SweepConfig":
        if self.metric in ("seconds", "gpu_seconds"):
            raise ValueError(
                f"trials are compared by the first metric while they run: give {self.metric} after another"
            )
        if set(self.budget.model_dump(exclude_none=True)) == {"gpu_hours"} and not self.config.gpus_per_worker:
            raise ValueError("trials on CPUs spend no GPU-hours: give budget.trials, budget.hours or budget.target")
        return self

    @model_validator(mode="after")
    def _breedable(self) -> "SweepConfig":
        if self.scheduler.kind != "pbt":
            return self
        every, perturb = self.config.checkpoint_every, self.scheduler.perturb_steps
        if not every or perturb % every:
            raise ValueError(
                f"pbt copies checkpoints every {perturb} steps: config.checkpoint_every is {every}, give one that "
                f"divides scheduler.perturb_steps"
            )
        if self.function:
            raise ValueError("pbt changes the values of a space, not of a function: give scheduler.kind=asha or none")
        if self.repeat.top:
            raise ValueError("pbt changes values as it trains, which no seed repeats: give repeat.top=0")
        if min(self.concurrent, self.budget.trials or 2) < 2:
            raise ValueError("pbt compares trials that run together: give concurrent and budget.trials of 2 or more")
        return self
