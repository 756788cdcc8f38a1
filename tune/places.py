"""Which card a trial gets: the smallest free one that its estimated memory fits on, so that large ones stay free. One
of several workers gets as many of one kind.

Only where cards are known by name and size, and the estimate can be made (``train sft --plan``); elsewhere every trial
is placed alike. A share of a card is given only where it was asked for, and then as much as the trial is estimated to
need, so that no more trials are on a card than it holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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


class HostGone(Exception):
    """The cards that could hold a trial were there, and are not now."""


@dataclass
class Kind:
    """Cards of one model that trials may get: one whole card of it, how many are up, how many of these others had when
    it was first seen, and how much is taken."""

    memory_gb: float
    whole: Placement
    up: float
    others: float
    taken: float = 0.0

    def room(self, workers: int) -> float:
        """What trials of ``workers`` may have of it; at least one such trial, as others' cards come free."""
        return max(self.up - self.others, float(workers)) if self.up else 0.0


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

    @property
    def had_gb(self) -> float:
        """What each worker has of its card's memory."""
        return self.memory_gb * min(1.0, self.share)


class Places:
    """The cards of a sweep on ``nodes``, and which of them trials have.

    Raises UserError where no host can ever hold a trial of ``config``.
    """

    def __init__(self, config: TrainingConfig, nodes: Sequence[Node]) -> None:
        self._request, self._workers = config.request(), config.workers
        self._held: dict[int, Place] = {}
        self._kinds: list[Kind] = []
        self.refresh(nodes)

    def refresh(self, nodes: Sequence[Node]) -> None:
        """Take the hosts for what ``nodes`` says now: some may be gone, some new; trials keep what they hold.

        Raises UserError where no host can hold a trial any more.
        """
        for kind in self._kinds:
            kind.up = 0.0
        known = {_key(kind.whole): kind for kind in self._kinds}
        for placement, memory_gb, up, free in self._ways(nodes):
            kind = known.get(_key(placement)) or Kind(memory_gb, placement, up, up - free)
            kind.whole, kind.up = placement, up
            known[_key(placement)] = kind
        self._kinds = sorted(known.values(), key=lambda kind: (bool(kind.whole.cards), kind.memory_gb))
        usual = place(self._request, nodes, workers=self._workers)
        self._usual = Place(usual, self._request.gpu_share, workers=self._workers)

    def _ways(self, nodes: Sequence[Node]) -> Iterator[tuple[Placement, float, float, float]]:
        """Of each kind of card one whole card, its GB, how many are up, and how many of these are free."""
        need = self._request.gpu
        if need is None:
            return
        sizes = {card.model: card.memory_gb for node in nodes for card in node.cards}
        one = CardNeed(model=need.model, memory=need.memory or ">=0GB")
        whole = self._request.model_copy(update={"gpu": one, "share": None})
        idle = ways(whole, [replace(node, free=None) for node in nodes], workers=self._workers)
        up = {_key(placement): float(count) for placement, count in idle}
        for placement, free in ways(whole, nodes, workers=self._workers):
            models = [name for name in placement.resources if name in sizes]
            if models and (need.model or need.memory or not placement.cards):  # reserved: only by its name or size
                yield placement, sizes[models[0]], up[_key(placement)], float(free)

    def is_gone(self, number: int) -> bool:
        """Whether no host that is up has what trial ``number`` was given."""
        held = self._held[number]
        if held.kind is not None:
            return not held.kind.up
        return _key(held.placement) != _key(self._usual.placement)

    def has_room(self) -> bool:
        """Whether a trial might get a place now."""
        return not self._kinds or any(kind.taken + 1e-6 < kind.room(self._workers) for kind in self._kinds)

    def take(self, number: int, config: TrainingConfig, over_gb: float = 0.0) -> Place | None:
        """A free place for trial ``number``, with more than ``over_gb`` of a card's memory; None where it must wait.

        Raises DoesNotFit where no card is large enough, HostGone where none that is has a host now.
        """
        tensors = estimated(config)[1] if config.gpus_per_worker else 0
        if not self._kinds:
            self._held[number] = replace(self._usual, needed=tensors)
            return self._held[number]
        needed, fits = self._fitting(config, over_gb)
        asked = config.request().gpu_share
        for kind in fits:
            share = 1.0 if over_gb else min(1.0, max(asked, math.ceil(100 * needed / kind.memory_gb) / 100))
            if kind.taken + share * self._workers <= kind.room(self._workers) + 1e-6:
                kind.taken += share * self._workers
                part = _part(kind.whole, share)
                self._held[number] = Place(part, share, kind.memory_gb, self._workers, tensors, kind)
                return self._held[number]
        if not any(kind.up for kind in fits):
            raise HostGone(f"no host that is up has {' or '.join(sorted({_model(kind.whole) for kind in fits}))}")
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


def _key(placement: Placement) -> tuple[Any, ...]:
    """What makes two placements of one request the same, also where other hosts have it now."""
    return tuple(sorted(placement.bundle().items())), placement.host, placement.visible


def _model(placement: Placement) -> str:
    return min(placement.resources, key=len)  # the other is the card's own, by its UUID


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
