"""``tune run --dry-run``: the first trials of a sweep, what each will need of a card, and where it would run.

Nothing is started: no Ray, no card, no weights. What a point needs is the estimate of ``train sft --plan``.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.config import SweepConfig
from tune.points import Proposer, source_of
from tune.space import Point, at_point, shown
from tune.study import SweepStudy
from workbench.errors import Failure

SHOWN = 10
GIB = 1 << 30


@dataclass(frozen=True)
class Planned:
    """A trial to come; ``bytes`` is what the card of each of its workers must hold, on a CPU its tensors, 0 where that
    cannot be told."""

    point: Point
    bytes: int
    where: str


@dataclass(frozen=True)
class DryRun:
    """The first trials, and what is said of those that follow."""

    trials: list[Planned]
    about: str

    def text(self) -> str:
        """For the terminal."""
        lines = [self.about]
        for number, trial in enumerate(self.trials):
            needs = f"{trial.bytes / GIB:.2f} GiB" if trial.bytes else "memory not known"
            lines.append(f"  {number:>2}  {shown(trial.point):<60}  {needs:>12}  {trial.where}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same for a program; sizes in bytes."""
        rows = [{"point": trial.point, "card_bytes": trial.bytes, "where": trial.where} for trial in self.trials]
        return {"estimate": True, "about": self.about, "trials": rows}


def dry_run(config: SweepConfig) -> DryRun:
    """The first ``SHOWN`` trials of ``config``. Raises UserError for what ``tune run`` would refuse."""
    source_of(config).check()
    points = first_points(config)
    about = f"the first {len(points)} of " + (
        f"{config.budget.trials} trials" if config.budget.trials else "the trials"
    )
    if config.searcher == "tpe":
        about += "; those after the tenth follow from what the first ones find"
    return DryRun([_planned(config, point) for point in points], about)


def first_points(config: SweepConfig) -> list[Point]:
    """The points of the first ``SHOWN`` trials, or of fewer where there are no more."""
    source = source_of(config)
    with tempfile.TemporaryDirectory() as folder:
        study = SweepStudy(Path(folder), config.metrics, create=True)
        proposer, points = Proposer(config, source, study), list[Point]()
        while len(points) < min(SHOWN, config.budget.trials or SHOWN) and proposer.propose():
            trial = study.ask()
            points.append(study.begin(trial, source.suggest(trial)).point)
    return points


def _planned(config: SweepConfig, point: Point) -> Planned:
    from workloads.plan import estimate, known_cards

    chosen = at_point(config.config, point)
    try:
        plan = estimate(chosen)
    except Failure as error:
        return Planned(point, 0, str(error))
    several = f"{chosen.workers} workers, each " if chosen.workers > 1 else ""
    if not chosen.gpus_per_worker:
        return Planned(point, plan.peak, f"{several}on {chosen.request()}")
    need = chosen.request().gpu
    fits = [
        f"{card.name} ({card.memory_gb:g} GB)"
        for card in known_cards()
        if card.holds(plan) == "yes" and card.memory_gb >= (need.memory_gb if need else 0.0)
    ]
    return Planned(
        point, plan.card, several + (f"fits on {', '.join(fits)}" if fits else "fits on no card that is known")
    )
