"""Train a ladder of model sizes and fit the law by which loss falls with size.

    workbench train scaling configs/train/scaling.yaml

Each size, with each number of steps, is a ``train pretrain`` run of its own with a schedule of its own, one after the
other, on the same corpus and tokenizer. A ladder that was cut short goes on with ``resume=train-scaling/TIME``, which
takes over the runs that are finished; so does a ladder with more sizes. Artifact: ``ladder.json``, what each run had.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

import workloads.pretrain
from workbench.config import UNVISITED, Config, load
from workbench.errors import Failure, UserError
from workbench.files import read_json, read_record, write_json
from workbench.runs import Run, Summary, finish, open_run, resolve_run, run_id, state_of
from workloads.pretrain import PretrainConfig
from workloads.scaling_law import LEAST_SIZES, Law, bootstrap, fit, interval

LADDER = "ladder.json"


class SizeConfig(Config):
    """One size of the ladder; what it does not say is as in ``model``."""

    hidden_size: int = Field(ge=32, description="width")
    layers: int = Field(ge=1, description="decoder layers")
    mlp_size: int = Field(ge=32, description="width of the SwiGLU layer")
    learning_rate: float | None = Field(None, gt=0, description="peak of the schedule; none: that of all")


class ScalingConfig(PretrainConfig):
    """Config of ``train scaling``: that of ``train pretrain``, and what varies."""

    sizes: list[SizeConfig] = Field(description=f"the ladder, at least {LEAST_SIZES} sizes")
    step_budgets: list[int] = Field(
        [], description="steps of each size, a run each, at least three, to learn what tokens bring; none: steps"
    )
    draws: int = Field(200, ge=20, description="bootstrap draws behind the 95% intervals")
    reach: float = Field(10.0, ge=1, description="how far the figure looks beyond the largest size, in parameters")

    @model_validator(mode="after")
    def _fittable(self) -> "ScalingConfig":
        if len({(size.hidden_size, size.layers, size.mlp_size) for size in self.sizes}) < LEAST_SIZES:
            raise ValueError(f"{len(self.sizes)} sizes: a scaling law takes at least {LEAST_SIZES} different ones")
        if len(set(self.step_budgets)) == 2:
            raise ValueError("two step_budgets say nothing about an exponent: give at least three, or steps alone")
        if self.early_stopping is not None:
            raise ValueError("runs are compared at the end of their schedules: give early_stopping=null")
        self.rungs()
        return self

    def rungs(self) -> list[PretrainConfig]:
        """The config of each run, the cheapest first. Raises ValueError for one that cannot work."""
        shared = {name: value for name, value in self.model_dump().items() if name in PretrainConfig.model_fields}
        rungs = []
        for size in self.sizes:
            given = size.model_dump(exclude={"learning_rate"})
            for steps in sorted(set(self.step_budgets)) or [self.steps]:
                rung = {
                    **shared, "model": {**shared["model"], **given}, "steps": steps, "resume": None,
                    "learning_rate": size.learning_rate or self.learning_rate,
                }  # fmt: skip
                try:
                    rungs.append(PretrainConfig.model_validate(rung, context=UNVISITED))
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"size {given}, {steps} steps: {reason}") from None
        return sorted(rungs, key=lambda rung: rung.model.hidden_size**2 * rung.model.layers * rung.steps)


def check(config: ScalingConfig) -> None:
    """Raise UserError for what ``train pretrain`` refuses, and for a ladder to go on with that is none."""
    workloads.pretrain.check(config.model_copy(update={"resume": None}))
    earlier_runs(config.resume)


def run(config: ScalingConfig, run: Run) -> Summary:
    """Train the ladder's runs, fit the law, and report."""
    from workloads.pretraining import copies_needed
    from workloads.training.ray_train import check_placement

    check_placement(config)
    earlier, rungs = earlier_runs(config.resume), config.rungs()
    copies = config.chemistry_copies or copies_needed(config, max(rung.steps for rung in rungs))
    folders: list[Path] = []
    for number, rung in enumerate(rungs, 1):
        rung = rung.model_copy(update={"chemistry_copies": copies})
        run.say(
            f"{number} of {len(rungs)}: width {rung.model.hidden_size}, {rung.model.layers} layers, {rung.steps} steps"
        )
        train_rung(rung, earlier, folders, run)
    rows = [facts_of(folder) for folder in folders]
    if len({row["corpus"] for row in rows}) > 1:
        raise Failure("the runs did not have the same corpus: was chemistry, documents or seed changed between them?")
    points = [(row["parameters"], row["tokens"], row["loss"]) for row in rows]
    law = fit(points)
    laws = bootstrap(points, law, config.draws, config.seed)
    return report(config, run, rows, law, laws)


def earlier_runs(reference: str | None) -> list[Path]:
    """The run folders of the ladder ``reference``. Raises UserError where it is none, or is still running."""
    if reference is None:
        return []
    folder = resolve_run(reference)
    if folder.parent.name != "train-scaling" or not (folder / "artifacts" / LADDER).is_file():
        raise UserError(f"resume: {run_id(folder)} is no ladder that has begun: give a run of 'train scaling'")
    if state_of(folder) == "running":
        raise UserError(f"resume: {run_id(folder)} is still running")
    return [resolve_run(row["run"]) for row in read_json(folder / "artifacts" / LADDER)]


def train_rung(rung: PretrainConfig, earlier: list[Path], folders: list[Path], run: Run) -> None:
    """Train ``rung`` in a run folder of its own, or go on with an equal one of ``earlier``; adds to ``folders``."""
    from workbench.session import hosts
    from workloads.training.checkpoint import complete
    from workloads.training.resume import CHECKPOINTS, changes

    def begun(folder: Path) -> None:
        folders.append(folder)
        write_json(run.artifact(LADDER), [{"run": run_id(each)} for each in folders])

    for folder in earlier:
        if not changes(load(PretrainConfig, folder / "config.yaml", visit_paths=False), rung):
            if state_of(folder) == "finished":
                run.say(f"taken over: {run_id(folder)}")
                begun(folder)
                return
            if complete(folder / CHECKPOINTS):
                rung = rung.model_copy(update={"resume": run_id(folder)})
    workloads.pretrain.check(rung)
    label = f"h{rung.model.hidden_size}-l{rung.model.layers}-s{rung.steps}"
    with open_run("train", "pretrain", rung, name=label) as own:
        begun(own.folder)
        own.hosts(hosts())
        finish(own, workloads.pretrain.run(rung, own))


def facts_of(folder: Path) -> dict[str, Any]:
    """What a finished run adds to the ladder."""
    summary, inputs = read_json(folder / "summary.json"), read_record(folder / "inputs.json") or {}
    config = load(PretrainConfig, folder / "config.yaml", visit_paths=False)
    return {
        "run": run_id(folder), "width": config.model.hidden_size, "layers": config.model.layers, "steps": config.steps,
        "parameters": summary["parameters"], "tokens": summary["tokens"], "loss": summary["validation_loss"],
        "passes": inputs["corpus"]["passes over them"], "corpus": inputs["corpus"]["sha256"],
    }  # fmt: skip


def report(config: ScalingConfig, run: Run, rows: list[dict[str, Any]], law: Law, laws: list[Law]) -> Summary:
    """The law, the figure and the runs; returns the summary."""
    from workloads.figures import scaling_curves

    varied = law.b > 0
    form = "L(N, D) = E + A / N^alpha + B / D^beta" if varied else "L(N) = E + A / N^alpha"
    names = ["e", "a", "alpha", *(["b", "beta", "compute_exponent"] if varied else [])]
    constants = {name: (getattr(law, name), *interval([getattr(other, name) for other in laws])) for name in names}
    largest = max(rows, key=lambda row: (row["parameters"], row["tokens"]))
    further = config.reach * largest["parameters"], largest["tokens"]
    there = float(law.loss(*further))
    low, high = (float(edge) for edge in interval([other.loss(*further) for other in laws]))
    for row in rows:
        row["fitted"] = float(law.loss(row["parameters"], row["tokens"]))
        row["error"] = f"{row['fitted'] / row['loss'] - 1:+.2%}"
    write_json(run.artifact(LADDER), rows)

    run.report.heading(
        "Scaling law", form + "; N parameters, embeddings included, D tokens trained on, L nats a token."
    )
    run.report.figure(
        "Held-out loss against size", scaling_curves(rows, law, laws, config.reach),
        "Dashed: beyond the ladder, an extrapolation. Shaded: 95% of bootstrap draws of the fit's own errors; what "
        "another seed, learning rate or corpus would change is not in them.",
    )  # fmt: skip
    run.report.table(
        "Constants",
        [{"constant": name, "value": value, "95% from": a, "to": b} for name, (value, a, b) in constants.items()],
        "compute_exponent: the best size grows with compute to this power, the best number of tokens with the rest.",
    )
    shown = [{key: value for key, value in row.items() if key != "corpus"} for row in rows]
    run.report.table("Runs", shown, "passes: how often the corpus was seen; above one, tokens are worth less.")
    summary = {
        "runs": len(rows), "largest_parameters": largest["parameters"], "lowest_loss": min(row["loss"] for row in rows),
        "alpha": law.alpha, "alpha_low": float(constants["alpha"][1]), "alpha_high": float(constants["alpha"][2]),
        "irreducible": law.e, "extrapolated_parameters": further[0], "extrapolated_loss": there,
        "extrapolated_low": low, "extrapolated_high": high,
    }  # fmt: skip
    if varied:
        summary |= {"beta": law.beta, "compute_exponent": law.compute_exponent}
    smaller = [row for row in rows if row["parameters"] < largest["parameters"]]
    if len({row["parameters"] for row in smaller}) >= LEAST_SIZES:
        without = fit([(row["parameters"], row["tokens"], row["loss"]) for row in smaller])
        told = float(without.loss(largest["parameters"], largest["tokens"]))
        summary["largest_foretold_error"] = told / largest["loss"] - 1
        run.report.text(
            "Does it foretell?",
            f"Fitted without the largest size, the law gives it {told:.4f}; it came to {largest['loss']:.4f} "
            f"({told / largest['loss'] - 1:+.2%}).",
        )
    return summary
