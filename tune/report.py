"""The report of a sweep: what mattered, what it cost, and whether stopping early was right."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tune import figures
from tune.config import SweepConfig
from tune.outcome import COSTS
from tune.space import at_point
from tune.study import SweepStudy, TrialRecord
from tune.sweep import deals_other_rows
from workbench.config import dump
from workbench.runs import Run

WORDS = {"validation_loss": "held-out loss"}
"""Metrics as a person says them."""

OTHER_ROWS = (
    "The sweep dealt its rows once, for the trial that sees the most, by config.seed; the command deals as many as its "
    "own steps see, by its own seed. Where there are more rows, it trains on others, in another order."
)


def write_report(config: SweepConfig, run: Run, study: SweepStudy, best: TrialRecord | None) -> None:
    """Fill ``run.report`` from the study as it is now."""
    trials, word = study.trials(), WORDS.get(config.metric, config.metric)
    run.report.heading("Trials", f"{config.workload} {_on(config)}, up to {config.config.steps} steps each")
    run.report.table(
        "Every trial", _rows(trials, best, word), "Stopped early: the scheduler found it behind the others."
    )
    run.report.figure(
        word.capitalize(), figures.curves(trials, word), "By step; grey trials did not come to their end."
    )
    over = f"{word.capitalize()} over the space"
    run.report.figure(
        over, figures.parallel_coordinates(trials, word, config.minimises), "One line a trial, by its value."
    )
    finished = [trial for trial in trials if trial.state == "finished"]
    if (figure := figures.importances(study, finished)) is not None:
        run.report.figure(
            "What mattered", figure,
            "Share of the differences between finished trials that each key explains (fANOVA, Hutter et al. 2014): "
            f"an estimate from {len(finished)} trials.{_left_out(finished)}",
        )  # fmt: skip
    if (figure := figures.contour(study, finished, word)) is not None:
        run.report.figure(
            "Over the two keys that matter most", figure, "Between the finished trials the value is only interpolated."
        )
    if repeated := _over_seeds(study, trials):
        run.report.table("The best over seeds", repeated, "The 95% interval of the mean is Student's.")
    if best is not None:
        run.report.text("Train the best again", _rerun(config, run, best, trials))
    run.report.heading("Cost", _cost(trials))
    run.report.figure("Trials by host and card", figures.timeline(trials), "From start to end of each attempt.")
    run.report.figure(
        "Quality against cost", figures.pareto(study, finished, word),
        "Finished trials; on the line are those that none beats in both.",
    )  # fmt: skip
    for other in list(config.metrics)[1:]:
        if other not in COSTS:  # they are in the figure above
            run.report.figure(
                f"{word.capitalize()} against {WORDS.get(other, other)}", figures.front(study, finished, other, word),
                "Finished trials; on the line are those that none beats in both.",
            )  # fmt: skip
    run.report.table("Cost by host and card", _by_card(trials))
    check = StopCheck.of(study, trials)
    run.report.text("Was stopping early right?", check.text())
    if failed := [trial for trial in trials if trial.state in ("failed", "diverged", "does not fit")]:
        rows = [{"trial": t.number, "state": t.state, "reason": t.reason, **t.point} for t in failed]
        run.report.table("Trials without a result", _even(rows))
    facts = study.note("payload", {}).get("facts", {})
    run.report.heading("Data")
    run.report.table("The data", [{"fact": key, "count": value} for key, value in facts.items()])
    run.report.links(
        "Artifacts", {"best adapter and merged model": "artifacts/best/", "all trials": "artifacts/trials/"}
    )


def _on(config: SweepConfig) -> str:
    bases = config.space["base"].extremes if "base" in config.space else [getattr(config.config, "base", "")]
    return f"on {', '.join(map(str, bases))}" if any(bases) else "of a new model"


def _left_out(finished: Sequence[TrialRecord]) -> str:
    """The keys that fANOVA cannot weigh, as only some trials have them."""
    keys = dict.fromkeys(key for trial in finished for key in trial.point)
    some = [key for key in keys if any(key not in trial.point for trial in finished)]
    return f" Left out, because only some trials have a value: {', '.join(some)}." if some else ""


def _rows(trials: Sequence[TrialRecord], best: TrialRecord | None, word: str) -> list[dict[str, Any]]:
    return _even(
        {"trial": t.number, **t.point, "steps": t.steps, word: t.value, "seconds": round(t.seconds, 1),
         "set-up, s": t.attempts[-1].get("setup") if t.attempts else None, **_energy(t.joules, "Wh"), **_origin(t),
         "state": t.state + (", best" if best and t.number == best.number else ""), "reason": t.reason}
        for t in trials
    )  # fmt: skip


def _even(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the same columns: the first row's are those of a table."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def _energy(joules: float | None, name: str) -> dict[str, float]:
    return {} if joules is None else {name: round(joules / 3600, 2)}


def _origin(trial: TrialRecord) -> dict[str, str]:
    """Which trial's checkpoint it went on from, which seed it repeats another with."""
    if trial.parent is not None:
        return {"from": f"trial {trial.parent}, step {trial.parent_step}"}
    return {} if trial.repeats is None else {"from": f"repeats trial {trial.repeats}"}


def _over_seeds(study: SweepStudy, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Trials that were repeated, with the mean of the first metric and its interval."""
    from scipy.stats import t

    rows = []
    for number, values in study.over_seeds(trials).items():
        if len(values) > 1:
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
            rows.append({"trial": number, "seeds": len(values), "mean": mean, "from": mean - half, "to": mean + half})
    return rows


def _rerun(config: SweepConfig, run: Run, best: TrialRecord, trials: Sequence[TrialRecord]) -> str:
    """The command, and for a trial of a population what it cannot repeat: the values that it had before."""
    file = run.artifact("best") / "config.yaml"
    kept = f"workbench {config.workload} {file}"
    chosen = at_point(config.config, best.point)
    if dump(chosen) not in (file.read_text() if file.is_file() else ""):
        kept = f"trial {best.number}, so far: it is kept, with the command that trains it again, when the sweep ends"
    lines = [kept, "", json.dumps(best.point)]
    if deals_other_rows(config, chosen):
        lines += ["", OTHER_ROWS]
    if best.parent is not None:
        lines += ["", "It had these values from a copied checkpoint on; before it was, last first:"]
    while best.parent is not None:
        step, best = best.parent_step, trials[best.parent]
        lines.append(f"trial {best.number} up to step {step}: {json.dumps(best.point)}")
    return "\n".join(lines)


def _cost(trials: Sequence[TrialRecord]) -> str:
    seconds, cards = (sum(getattr(trial, name) for trial in trials) for name in ("seconds", "gpu_seconds"))
    set_up = [attempt["setup"] for trial in trials for attempt in trial.attempts if "setup" in attempt]
    text = f"{seconds / 3600:.2f} hours of trials, {cards / 3600:.2f} GPU-hours"
    counted = [trial.joules for trial in trials if trial.joules is not None]
    if counted:
        text += f", {sum(counted) / 3.6e6:.3f} kWh of cards in the {len(counted)} trials in which they were counted"
    return text + (f"; set-up of a trial: median {statistics.median(set_up):.1f} s" if set_up else "")


def _by_card(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    spent: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for attempt in (attempt for trial in trials for attempt in trial.attempts if "ended" in attempt):
        spent[attempt.get("host", "?"), attempt.get("card", "") or "CPU"].append(attempt)
    rows = []
    for (host, card), each in sorted(spent.items()):
        seconds = [attempt["ended"] - attempt["began"] for attempt in each]
        cards = [length * attempt.get("gpus", 0.0) for length, attempt in zip(seconds, each, strict=True)]
        counted = [attempt["joules"] for attempt in each if attempt.get("joules") is not None]
        row = {"host": host, "card": card, "attempts": len(each), "hours": round(sum(seconds) / 3600, 3)}
        row |= {"GPU-hours": round(sum(cards) / 3600, 3)}
        rows.append(row | _energy(sum(counted) if counted else None, "Wh, where counted"))
    return _even(rows)


@dataclass(frozen=True)
class StopCheck:
    """Of trials that a scheduler wanted to stop: how many it did, how many were spared and came to an end, and how many
    of those then were better than every trial that it never wanted to stop."""

    stopped: int
    spared: int
    won: int
    """Of those that were spared: one that diverged or failed later has not won."""

    @classmethod
    def of(cls, study: SweepStudy, trials: Sequence[TrialRecord]) -> "StopCheck":
        """Counted over the study."""
        spared = [trial for trial in trials if trial.spared_at and trial.state in ("finished", "diverged", "failed")]
        metric = next(iter(study.metrics))
        others = [
            t.values[metric] for t in trials if t.state == "finished" and not t.spared_at and t.repeats is None
        ]  # each by one seed, as the spared are
        finished = [trial for trial in spared if trial.state == "finished"]
        won = [t for t in finished if all(study.better(t.values[metric], other) for other in others)]
        return cls(sum(trial.state == "stopped early" for trial in trials), len(spared), len(won))

    def text(self) -> str:
        """With an exact binomial interval (Clopper and Pearson 1934)."""
        if not self.spared:
            return f"{self.stopped} trials were stopped early and none was spared to the end: it cannot be told."
        from scipy.stats import binomtest

        low, high = binomtest(self.won, self.spared).proportion_ci(0.95, method="exact")
        return (
            f"{self.stopped} trials were stopped early. {self.spared} more would have been and went on on purpose: "
            f"{self.won} of them became the best. A stopped trial would have won in an estimated "
            f"{self.won / self.spared:.0%} of cases (95% interval {low:.0%} to {high:.0%})."
        )
