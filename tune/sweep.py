"""Sweep a workload's config: Ray Tune runs points spread over the space, ASHA stops the ones that fall behind.

    workbench tune run configs/demo/sweep.yaml trials=8 scheduler.grace_steps=20

A trial is one process on one device that runs the workload's own loop: no Ray Train inside Tune, whose worker groups
cost four times as long to set up. ASHA is Li et al. 2018, arXiv:1810.05934. Artifacts: ``trials/``, and ``best/``
with the best trial's ``adapter/``, ``merged/`` model and ``config.yaml``, which ``train sft`` reruns.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

import workloads.sft
from cluster.nodes import Node
from cluster.placement import Placement, place
from tune.space import Range, at_point, check_space, draw_points
from workbench.config import Config, dump
from workbench.errors import Failure
from workbench.files import write_atomic
from workbench.resources import ResourceRequest
from workbench.runs import Run, Summary
from workloads.sft import SftConfig, write_merged


class TrialConfig(SftConfig):
    """The workload of a trial: ``train sft`` in one process."""

    workers: int = Field(1, ge=1, le=1, description="a trial is one process")
    strategy: Literal["single"] = Field("single", description="a trial is one process")
    method: Literal["lora"] = Field("lora", description="trials train adapters")
    several: ClassVar[bool] = False


class SchedulerConfig(Config):
    """ASHA: at each rung, a trial outside the best share is stopped."""

    grace_steps: int = Field(50, ge=1, description="no trial is stopped before this step")
    reduction_factor: float = Field(2.0, gt=1, description="one in this many goes on at each rung")


class SweepConfig(Config):
    """Config of ``tune run``."""

    workload: Literal["train sft"] = Field("train sft", description="the command that a trial runs")
    config: TrialConfig = Field(description="keys of the workload that all trials share")
    space: dict[str, Range] = Field(min_length=1, description="dotted key: {choice|uniform|loguniform: [...]}")
    trials: int = Field(4, ge=1, description="points to draw")
    concurrent: int = Field(2, ge=1, description="trials at a time, where the cluster has room")
    resources: ResourceRequest | None = Field(None, description="what a trial gets; the same as config.resources")
    scheduler: SchedulerConfig = Field(SchedulerConfig(), description="when a trial is stopped")
    seed: int = Field(0, description="which points are drawn")

    @model_validator(mode="after")
    def _placed(self) -> "SweepConfig":
        if self.resources is not None and self.config.resources != self.resources:
            if self.config.resources is not None:
                raise ValueError("resources and config.resources differ: give one of them")
            self.__dict__["config"] = self.config.asking_for(self.resources)
        return self

    @model_validator(mode="after")
    def _comparable(self) -> "SweepConfig":
        every, grace = self.config.validate_every, self.scheduler.grace_steps
        if not every or every > grace:
            raise ValueError(
                f"trials are compared by validation loss, at step {grace} first: "
                f"config.validate_every is {every}, give 1 to {grace}"
            )
        return self


def check(config: SweepConfig) -> None:
    """Raise UserError for a space that the workload does not have, and for what the workload refuses."""
    check_space(config.config, config.space)
    workloads.sft.check(config.config)


def places(config: SweepConfig, nodes: Sequence[Node]) -> list[Placement]:
    """Where a trial would run. Raises UserError where no host can hold one."""
    return [place(config.config.request(), nodes)]


def run(config: SweepConfig, run: Run) -> Summary:
    """Check the space, prepare the rows once, run the trials, keep the best, and report."""
    from workloads.prepared import prepare
    from workloads.training.ray_train import check_placement

    check(config)
    placement = check_placement(config.config, run.say)
    facts = prepare(config.config, run).facts
    trials = run_trials(config, run, placement)
    finished = [trial for trial in trials if (Path(trial["folder"]) / "adapter_config.json").is_file()]
    if not finished:
        raise Failure(f"no trial came to its end: {'; '.join(t['error'] or 'stopped' for t in trials)}")
    best = min(finished, key=lambda trial: trial["validation_loss"])
    run.say(f"best: trial {best['trial']}, held-out loss {best['validation_loss']:.3f}; merging its adapter")
    keep_best(config, run, best)
    report(config, run, trials, best, facts)
    return {
        "trials": len(trials),
        "finished": len(finished),
        "stopped_early": sum(trial["state"] == "stopped early" for trial in trials),
        "failed": sum(trial["state"] == "failed" for trial in trials),
        "best_trial": best["trial"],
        "best_validation_loss": best["validation_loss"],
        **{f"best_{key}": value for key, value in best["point"].items()},
        "molecules_shared": facts.get("molecules_shared", 0),
        "scaffolds_shared": facts.get("scaffolds_shared", 0),
    }


def run_trials(config: SweepConfig, run: Run, placement: Placement) -> list[dict[str, Any]]:
    """Run all trials; one dict each: trial, point, state, steps, validation_loss, curve, folder, error."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from tune.trial import Progress, sft_trial
    from workloads.tokenized import cache_folder

    shared = {
        "config": config.config,
        "train": str(run.artifact("train.jsonl")),
        "validation": str(run.artifact("validation.jsonl")),
        "cache": str(cache_folder()),
        "folder": str(run.artifact("trials")),
        "environment": placement.env_vars,
    }
    selector = {"bundle_label_selector": [placement.label_selector]} if placement.label_selector else {}
    needs = tune.PlacementGroupFactory([placement.bundle()], **selector)
    progress = Progress(run)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(sft_trial, shared=shared), needs),
        param_space={"point": tune.grid_search(draw_points(config.space, config.trials, config.seed))},
        tune_config=tune.TuneConfig(
            metric="validation_loss",
            mode="min",
            max_concurrent_trials=config.concurrent,
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=config.config.steps + 1,  # at max_t it would stop a trial before its adapter is saved
                grace_period=min(config.scheduler.grace_steps, config.config.steps),
                reduction_factor=config.scheduler.reduction_factor,
            ),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=str(run.folder / "ray"), verbose=0, callbacks=[progress]
        ),
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):  # Tune announces itself there, and --json prints JSON alone
        tuner.fit()
    trials = progress.trials(run.artifact("trials"))
    for number, trial in enumerate(trials):
        if trial["validation_loss"] is not None:
            numbers = {key: value for key, value in trial["point"].items() if isinstance(value, int | float)}
            run.metrics(number, validation_loss=trial["validation_loss"], steps=trial["steps"], **numbers)
    return trials


def _name(trial: Any) -> str:
    """Trials are named by their number: Tune's ids end in it."""
    return str(int(trial.trial_id.rpartition("_")[2]))


def keep_best(config: SweepConfig, run: Run, best: dict[str, Any]) -> None:
    """Copy the best adapter, merge it, and write the config that trains it again."""
    chosen = at_point(config.config, best["point"])
    folder = run.artifact("best", "adapter")
    shutil.copytree(best["folder"], folder)
    write_merged(chosen.base, folder, run.artifact("best", "merged"), chosen.compute_dtype)
    file = run.artifact("best", "config.yaml")
    write_atomic(file, f"# workbench train sft {file}\n{dump(chosen)}")


def report(
    config: SweepConfig, run: Run, trials: list[dict[str, Any]], best: dict[str, Any], facts: dict[str, Any]
) -> None:
    """The trials as a table, their curves, and loss over the space."""
    from tune.figures import curves, parallel_coordinates

    run.report.heading("Trials", f"{config.workload} on {config.config.base}, up to {config.config.steps} steps each")
    rows = [
        {"trial": t["trial"], **t["point"], "steps": t["steps"], "held-out loss": t["validation_loss"],
         "state": t["state"] + (", best" if t is best else ""), "error": t["error"]}
        for t in trials
    ]  # fmt: skip
    run.report.table("Every trial", rows, "Stopped early: ASHA found it outside the best share at a rung.")
    run.report.figure("Held-out loss", curves(trials), "Nats per answer token; lower is better.")
    run.report.figure("Loss over the space", parallel_coordinates(trials), "One line a trial, by its last loss.")
    run.report.text(
        "Train the best again",
        f"workbench train sft {run.artifact('best', 'config.yaml')}\n\n{json.dumps(best['point'])}",
    )
    run.report.table("The data", [{"fact": key, "count": value} for key, value in facts.items()])
    run.report.links("Artifacts", {"best adapter and merged model": "artifacts/best/"})
