"""Sweep a workload's config: Ray Tune runs points of a space, and an Optuna study in the run folder remembers them.

    workbench tune run configs/demo/sweep.yaml budget.trials=8 scheduler.grace_steps=20

A trial is one process on one device, or a group of them, that runs the workload's own loop, and each process runs one
trial after the other.
Artifacts: ``trials/NUMBER/`` with the metrics and the result of each, and ``best/`` with the best trial's ``adapter/``,
``merged/`` model and ``config.yaml``, which its command reruns.
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from cluster.nodes import Node
from cluster.placement import Placement, place
from tune.config import SweepConfig
from tune.space import at_point
from workbench.config import dump
from workbench.errors import Failure, UserError
from workbench.files import write_atomic
from workbench.run_records import flatten
from workbench.runs import Run, Summary, run_id
from workloads.training.config import TrainingConfig

if TYPE_CHECKING:
    from tune.dry_run import DryRun
    from tune.places import Places
    from tune.study import SweepStudy, TrialRecord


def check(config: SweepConfig) -> None:
    """Raise UserError for a space that the workload does not have, and for what the workload refuses."""
    from tune.dry_run import first_points
    from tune.points import source_of

    source_of(config).check()
    first_points(config)  # a range that no grid can count, a function that fails at its third point
    config.of.check(config.config)
    _check_bases(config)


def _check_bases(config: SweepConfig) -> None:
    """Raise UserError for a base among the choices that is neither a folder nor to be had."""
    from workloads.sources import check_model

    for base in config.space["base"].extremes if "base" in config.space else []:
        check_model("space.base", str(base))


def plan(config: SweepConfig) -> "DryRun":
    """The first trials and what each will need, for ``--dry-run``."""
    from tune.dry_run import dry_run

    check(config)
    return dry_run(config)


def places(config: SweepConfig, nodes: Sequence[Node]) -> list[Placement]:
    """Where a trial would run. Raises UserError where no host can hold one."""
    return [place(config.config.request(), nodes, workers=config.config.workers)]


def run(config: SweepConfig, run: Run) -> Summary:
    """Check the space, prepare the rows once, run the trials, keep the best, and report."""
    from tune.sole import sole_driver
    from tune.study import SweepStudy

    check(config)
    where = place_trials(config, run)
    with sole_driver(run.folder):
        payload = config.of.prepare(with_most_rows(config), run)
        study = SweepStudy(run.folder, config.metrics, create=True)
        study.write_note("config", json.loads(config.model_dump_json()))
        study.write_note("payload", payload)
        return run_session(config, run, study, where)


def resume(config: SweepConfig, run: Run) -> Summary:
    """Go on with the sweep in ``run``'s folder: trials that were cut short from their last checkpoints, then new ones.

    Raises UserError for a config that is not the one that the sweep began with.
    """
    from tune.study import SweepStudy

    study = SweepStudy(run.folder, config.metrics, repair=True)
    began, now = (flatten(each) for each in (study.note("config", {}), json.loads(config.model_dump_json())))
    written = flatten(yaml.safe_load((run.folder / "config.yaml").read_text()))
    known = [key for key in {**began, **now} if key in began or key in written]  # others are new in this version
    if changed := [key for key in known if began.get(key) != now.get(key)]:
        raise UserError(
            f"{run_id(run.folder)} began with {changed[0]}={began.get(changed[0])}, and its config.yaml now has "
            f"{now.get(changed[0])}: its trials could not be compared; put it back, or start a new sweep "
            "(the budget is extended by 'workbench tune extend')"
        )
    config.of.check(config.config)
    study.write_note("pause", None)
    return run_session(config, run, study, place_trials(config, run))


def place_trials(config: SweepConfig, run: Run) -> "Places":
    """Where trials run. Raises UserError where none ever can, or none of the first fits on any card."""
    from cluster.nodes import member_nodes
    from tune.dry_run import first_points
    from tune.places import Places
    from workloads.training.ray_train import check_placement

    check_placement(config.config, run.say)
    nodes = member_nodes()
    places = Places(config.config, nodes)
    places.check([at_point(config.config, point) for point in first_points(config)], nodes, run.say)
    return places


def with_most_rows(config: SweepConfig) -> TrainingConfig:
    """The shared config with as many steps as the trial that sees the most rows."""
    shared, space = config.config, config.space
    most = {
        key: max([getattr(shared, key), *(space[key].extremes if key in space else ())])
        for key in ("steps", "batch_size")
    }
    packed = {"packing": True} if "packing" in space and True in space["packing"].extremes else {}
    steps = math.ceil(most["steps"] * most["batch_size"] / shared.batch_size)
    return shared.model_copy(update={"steps": steps, **packed})


def deals_other_rows(config: SweepConfig, chosen: TrainingConfig) -> bool:
    """Whether the command of ``chosen``, run by itself, may deal other rows than the sweep's trials had: it takes as
    many as its own steps see, by its own seed."""
    dealt = with_most_rows(config)
    sees, saw = (
        (each.steps * each.batch_size, each.seed, each.model_dump().get("packing")) for each in (chosen, dealt)
    )
    return sees != saw


def run_session(config: SweepConfig, run: Run, study: "SweepStudy", places: "Places") -> Summary:
    """Run what the study has left to do, then keep the best and report.

    Raises Failure where no trial came to its end.
    """
    from tune.driver import Driver
    from tune.points import source_of
    from tune.report import write_report

    driver = Driver(config, run, study, source_of(config), places, study.note("payload"))
    with contextlib.redirect_stdout(sys.stderr):  # Tune announces itself there, and --json prints JSON alone
        driver.fit()
    trials = study.trials()
    best = study.best(trials)
    if best is None and not driver.paused:
        raise Failure(f"no trial came to its end: {'; '.join(f'{t.number} {t.state}: {t.reason}' for t in trials)}")
    if best is not None:
        run.say(f"best: trial {best.number}, {config.metric} {best.values[config.metric]:.3f}; keeping it")
        keep_best(config, run, best)
    write_report(config, run, study, best)
    return summary_of(config, trials, best, driver.paused, study.note("payload")["facts"])


def summary_of(
    config: SweepConfig, trials: "list[TrialRecord]", best: "TrialRecord | None", paused: str, facts: dict[str, Any]
) -> Summary:
    """How many trials ended how, and the best."""
    states = [trial.state for trial in trials]
    summary: Summary = {
        "trials": len(trials),
        "finished": states.count("finished"),
        "stopped_early": states.count("stopped early"),
        "failed": sum(state in ("failed", "diverged", "does not fit") for state in states),
    }
    if states.count("stopped"):
        summary["stopped"] = states.count("stopped")
    if paused:
        summary |= {"paused": paused, "unfinished": states.count("running") + states.count("queued")}
    if best is not None:
        summary |= {
            "best_trial": str(best.number),
            **{f"best_{name}": value for name, value in best.values.items()},
            **{f"best_{key}": value for key, value in best.point.items()},
        }
    return summary | {key: facts[key] for key in ("molecules_shared", "scaffolds_shared") if key in facts}


def keep_best(config: SweepConfig, run: Run, best: "TrialRecord") -> None:
    """Make of the best trial's result what its command would have left, with the config that trains it again."""
    from tune.trial import RESULT

    chosen, folder, partial = at_point(config.config, best.point), run.artifact("best"), run.artifact("best.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    config.of.keep(chosen, run.artifact("trials", str(best.number), RESULT), partial)
    file = folder / "config.yaml"
    write_atomic(partial / file.name, f"# workbench {config.workload} {file}\n{dump(chosen)}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
