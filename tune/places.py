"""Which card a trial gets: the smallest free one that its estimated memory fits on, so that large ones stay free. One
of several workers gets as many of one kind.

Only where cards are known by name and size, and the estimate can be made (``train sft --plan``); elsewhere every trial
is placed alike. A share of a card is given only where it was asked for, and then as much as the trial is estimated to
need, so that no more trials are on a card than it holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from cluster.nodes import Node
from cluster.placement import Placement, place, ways
from workbench.errors import Failure, UserError
from workbench.resources import CardNeed
from workloads.training.config import TrainingConfig

GIB = 1 << 30

ALIKE = {"learning_rate": 1e-3, "final_learning_rate": 0.0, "weight_decay": 0.0, "gradient_clip": 1.0, "seed": 0}
"""Keys that change nothing about memory: trials that differ in them have one estimate."""


class DoesNotFit(Exception):
    """No card that a trial may get can hold it."""


@dataclass
class Kind:
    """Cards of one model that trials may get: one whole card of it, how many were free, and how much is taken."""

    memory_gb: float
    whole: Placement
    free: float
    taken: float = 0.0


@dataclass(frozen=True)
class Place:
    """What each of a trial's ``workers`` has: its placement, the share and the size of its card, 0 GB where that is not
    known, and the bytes of tensors that it is estimated to hold, 0 where that cannot be told."""

    placement: Placement
    share: float = 0.0
    memory_gb: float = 0.0
    workers: int = 1
    needed: int = 0
    kind: Kind | None = None

    @property
    def gpus(self) -> float:
        """Cards that the trial has in all."""
        return self.share * self.workers


class Places:
    """The cards of a sweep on ``nodes`` as they are when its session begins, and which of them trials have.

    Raises UserError where no host can ever hold a trial of ``config``.
    """

    def __init__(self, config: TrainingConfig, nodes: Sequence[Node]) -> None:
        request, self._workers = config.request(), config.workers
        self._usual = Place(place(request, nodes, workers=config.workers), request.gpu_share, workers=config.workers)
        self._held: dict[int, Place] = {}
        self._kinds: list[Kind] = []
        if request.gpu is None:
            return
        named = bool(request.gpu.model or request.gpu.memory)
        sizes = {card.model: card.memory_gb for node in nodes for card in node.cards}
        one = CardNeed(model=request.gpu.model, memory=request.gpu.memory or ">=0GB")
        whole = request.model_copy(update={"gpu": one, "share": None})
        for placement, free in ways(whole, nodes, workers=self._workers):
            models = [name for name in placement.resources if name in sizes]
            if models and (named or not placement.cards):  # a reserved card is asked for by its name or size
                self._kinds.append(Kind(sizes[models[0]], placement, float(max(free, self._workers))))

    def take(self, number: int, config: TrainingConfig, over_gb: float = 0.0) -> Place | None:
        """A free place for trial ``number``, on a card of more than ``over_gb``; None where it must wait.

        Raises DoesNotFit where no card is large enough.
        """
        tensors = estimated(config)[1] if config.gpus_per_worker else 0
        if not self._kinds:
            self._held[number] = replace(self._usual, needed=tensors)
            return self._held[number]
        needed, fits = self._fitting(config, over_gb)
        asked = config.request().gpu_share
        for kind in fits:
            share = 1.0 if asked == 1 else min(1.0, max(asked, math.ceil(100 * needed / kind.memory_gb) / 100))
            if kind.taken + share * self._workers <= kind.free + 1e-6:
                kind.taken += share * self._workers
                part = _part(kind.whole, share)
                self._held[number] = Place(part, share, kind.memory_gb, self._workers, tensors, kind)
                return self._held[number]
        return None

    def check(self, configs: Sequence[TrainingConfig], nodes: Sequence[Node], say: Callable[[str], Any]) -> None:
        """Raise UserError where none of the trials ``configs`` fits on any card that it may get; ``say`` hears of
        doubts."""
        from workloads.plan import check_memory

        reasons = []
        for config in configs:
            try:
                if self._kinds:
                    self._fitting(config, 0.0)
                else:
                    check_memory(config, nodes, say)
                return
            except (DoesNotFit, UserError) as error:
                reasons.append(str(error))
        if reasons:
            raise UserError(f"of the first {len(reasons)} trials none fits: {reasons[0]}; look with --dry-run")

    def _fitting(self, config: TrainingConfig, over_gb: float) -> tuple[float, list[Kind]]:
        """What a trial needs in GB, and the cards that have it."""
        needed = estimated(config)[0] / GIB
        fits = [kind for kind in self._kinds if kind.memory_gb >= needed and kind.memory_gb > over_gb]
        if not fits:
            largest = max(kind.memory_gb for kind in self._kinds)
            why = f"more than {over_gb:g} GB, which it had" if over_gb >= needed else f"{needed:.1f} GiB (estimated)"
            raise DoesNotFit(f"it needs {why}, and the largest card that it may get has {largest:g} GB")
        return needed, fits

    @property
    def waits(self) -> str:
        """What a trial would have had to wait for then."""
        return self._usual.placement.waits

    def give_back(self, number: int) -> None:
        """Trial ``number`` has ended."""
        place = self._held.pop(number, None)
        if place is not None and place.kind is not None:
            place.kind.taken -= place.gpus


def _part(whole: Placement, share: float) -> Placement:
    parts = {name: amount * share for name, amount in whole.resources.items()}
    return replace(whole, num_gpus=whole.num_gpus * share, resources=parts)


def estimated(config: TrainingConfig) -> tuple[int, int]:
    """What a worker's card must hold for ``config``, in bytes: in all, and of tensors alone; 0 where that cannot be
    told."""
    return _estimated(config.model_copy(update=ALIKE).model_dump_json(), type(config))


@lru_cache(maxsize=256)
def _estimated(text: str, schema: type[TrainingConfig]) -> tuple[int, int]:
    from workloads.plan import estimate

    try:
        plan = estimate(schema.model_validate_json(text))
    except Failure:
        return 0, 0
    return plan.card, plan.peak
