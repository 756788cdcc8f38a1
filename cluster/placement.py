"""A resource request becomes what Ray understands, and is refused at once where no host can ever satisfy it.

    placement = place(ResourceRequest(gpu={"model": "rtx-pro-6000"}), member_nodes())
    train.options(**placement.options()).remote()

How a card is pinned. Ray hands out ``GPU`` by index and cannot tell unlike cards of a host apart, so a raylet counts
only the plain cards of its host, which are of one model. Each card is also a resource of its model's name. A plain
card by name is ``GPU`` and that resource; a reserved card is that resource alone, on the one host that has it, and
CUDA_VISIBLE_DEVICES names its UUID in the worker's runtime environment. A plain request takes ``GPU`` alone: it can
get no reserved card, and no Mac has any ``GPU``.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.labels import HOST, MPS, NODE, CardOnHost, card_resource
from cluster.nodes import Node, member_nodes
from workbench.errors import UserError
from workbench.resources import ResourceRequest

ENOUGH = 1e-6
"""Ray counts in ten-thousandths."""

KEEP_VISIBLE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray hides all cards from a worker without ``GPU``, unless told to keep what its environment says."""

NO_SETTING = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", **KEEP_VISIBLE}
"""Ray must not narrow the list to the plain cards that it handed out."""


@dataclass(frozen=True)
class Placement:
    """What one worker asks of Ray. ``host`` is set where only one will do; ``waits`` says what is not free now."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    env_vars: dict[str, str] = field(default_factory=dict)
    device: Literal["cuda", "mps", "cpu"] = "cpu"
    cards: tuple[CardOnHost, ...] = ()
    host: str = ""
    waits: str = ""

    @property
    def visible(self) -> str:
        """The UUIDs that a process is given by its environment, empty where Ray assigns a card itself."""
        return self.env_vars.get("CUDA_VISIBLE_DEVICES", "")

    def bundle(self) -> dict[str, float]:
        """All of it as one dictionary: a placement group's bundle, Ray Train's ``resources_per_worker``."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of a worker, empty where it needs none."""
        return {"env_vars": dict(self.env_vars)} if self.env_vars else {}

    def options(self) -> dict[str, Any]:
        """For ``task.options(**...)`` and ``actor.options(**...)``."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, **self.data_options()}

    def data_options(self) -> dict[str, Any]:
        """The rest of ``options`` for Ray Data, which takes ``num_cpus`` and ``num_gpus`` apart."""
        rest = {
            "resources": self.resources, "label_selector": self.label_selector, "runtime_env": self.runtime_env()
        }  # fmt: skip
        return {name: value for name, value in rest.items() if value}


def place(request: ResourceRequest, nodes: Sequence[Node], *, workers: int = 1) -> Placement:
    """The placement of one of ``workers`` alike workers that ask for ``request``.

    ``waits`` is empty where all fit now. Raises UserError where they never can, with the nearest thing that exists.
    """
    if request.host and request.host not in {node.host for node in nodes}:
        raise UserError(_no_host(request.host, nodes))
    choices = [choice for choice in _choices(request, nodes, workers) if choice.room >= workers]
    if not choices:
        raise UserError(_refusal(request, nodes, workers))
    best = min(choices, key=lambda choice: (choice.free < workers, *choice.rank))
    if best.free < workers:
        return replace(best.placement, waits=_waiting(request, best, workers))
    return best.placement


def ways(request: ResourceRequest, nodes: Sequence[Node], *, workers: int = 1) -> list[tuple[Placement, int]]:
    """Every way to place one of ``workers`` alike workers, the one to prefer first, with how many of it fit now."""
    choices = [choice for choice in _choices(request, nodes, workers) if choice.room >= workers]
    return [(choice.placement, choice.free) for choice in sorted(choices, key=lambda choice: choice.rank)]


def place_here(request: ResourceRequest, say: Callable[[str], Any], *, workers: int = 1) -> Placement:
    """``place`` on the cluster that this process is connected to; what it must wait for is said."""
    placement = place(request, member_nodes(), workers=workers)
    if placement.waits:
        say(placement.waits)
    return placement


@dataclass(frozen=True)
class _Choice:
    """One way to place the workers: how many could ever run at once, how many could now, and what to prefer."""

    placement: Placement
    room: int
    free: int
    rank: tuple[Any, ...]
    where: tuple[Node, ...]


def _choices(request: ResourceRequest, nodes: Sequence[Node], workers: int) -> Iterable[_Choice]:
    cpus = 0.0 if request.cpu is None else request.cpu
    wanted = [node for node in nodes if not request.host or node.host == request.host]
    pin = _pin(request.host, wanted) if request.host else {}
    base = Placement(num_cpus=cpus, label_selector=pin, host=request.host, device=request.device)
    if request.all_on:
        yield from _all_cards(request, base, nodes, workers)
    elif isinstance(request.gpus, int):
        yield _choice(replace(base, num_gpus=float(request.gpus)), wanted, ())
    elif request.gpu is not None:
        yield from _one_card(request, base, wanted)
    elif request.mps:
        yield _choice(replace(base, resources={MPS: 1.0}), wanted, ())
    else:
        yield _choice(base, wanted, ())


def _pin(host: str, nodes: Sequence[Node]) -> dict[str, str]:
    """The label selector of a host: our label, or Ray's ids of its raylets where they have none."""
    ids = [node.unlabelled for node in nodes if node.unlabelled]
    return {NODE: f"in({','.join(ids)})"} if ids else {HOST: host}


def _one_card(request: ResourceRequest, base: Placement, nodes: Sequence[Node]) -> Iterable[_Choice]:
    """A plain card that fits, before a reserved one; among several the smallest."""
    assert request.gpu is not None
    share = request.gpu_share
    if not request.gpu.model and not request.gpu.memory:
        yield _choice(replace(base, num_gpus=share), nodes, ())
        return
    fits = [(node, card) for node in nodes for card in node.cards if _fits(request, card)]
    for model, memory in sorted({(card.model, card.memory_gb) for _, card in fits if not card.reserved}):
        # Elsewhere the model is reserved, or another is plain too, and Ray would hand out that one's index.
        offering = [node for node in nodes if any(card.model == model for card in node.cards)]
        holders = [node for node in offering if _plain_models(node) == {model}]
        selector = base.label_selector
        if 0 < len(holders) < len(offering):
            selector = {HOST: f"in({','.join(node.host for node in holders)})"}
        placement = replace(base, num_gpus=share, resources={model: share}, label_selector=selector)
        yield _choice(placement, holders, (False, memory))
    fitting = {card.model for _, card in fits if not card.reserved}
    if len(fitting) > 1:  # several workers may take cards of several models
        holders = [node for node in nodes if _plain_models(node) and _plain_models(node) <= fitting]
        selector = {HOST: f"in({','.join(node.host for node in holders)})"}
        yield _choice(replace(base, num_gpus=share, label_selector=selector), holders, (False, math.inf))
    for node, card in fits:
        if not card.reserved:
            continue
        resources = {card.model: share}
        if sum(other.model == card.model and other.reserved for other in node.cards) > 1:
            resources[card_resource(card.uuid)] = share
        placement = replace(
            base, resources=resources, label_selector={HOST: node.host}, host=node.host, cards=(card,),
            env_vars={"CUDA_VISIBLE_DEVICES": card.uuid, **KEEP_VISIBLE},
        )  # fmt: skip
        yield _choice(placement, [node], (True, card.memory_gb))


def _all_cards(request: ResourceRequest, base: Placement, nodes: Sequence[Node], workers: int) -> Iterable[_Choice]:
    """Every card of one host: for one worker all of them, for as many workers as cards an equal part of each.

    Each worker sees all cards and takes the one of its local rank.
    """
    for node in nodes:
        plain = [card for card in node.cards if not card.reserved]
        if node.host != request.all_on or not node.cards or workers not in (1, len(node.cards)):
            continue
        if plain and workers % len(plain):
            continue  # Ray cuts no worker's share out of two cards
        reserved = [card for card in node.cards if card.reserved]
        amounts = Counter(card.model for card in node.cards)
        counts = Counter(card.model for card in reserved)
        amounts.update(card_resource(card.uuid) for card in reserved if counts[card.model] > 1)
        placement = replace(
            base,
            num_gpus=_part(len(plain), workers),
            resources={name: _part(amount, workers) for name, amount in amounts.items()},
            label_selector={HOST: node.host},
            host=node.host,
            cards=node.cards,
            env_vars={"CUDA_VISIBLE_DEVICES": ",".join(card.uuid for card in node.cards), **NO_SETTING},
        )
        yield _choice(placement, [node], ())


def _part(amount: int, workers: int) -> float:
    """An equal part, cut off where Ray stops counting."""
    return math.floor(amount / workers * 10_000 + ENOUGH) / 10_000


def _fits(request: ResourceRequest, card: CardOnHost) -> bool:
    need = request.gpu
    assert need is not None
    return need.model in ("", card.model) and card.memory_gb >= need.memory_gb


def _plain_models(node: Node) -> set[str]:
    return {card.model for card in node.cards if not card.reserved}


def _choice(placement: Placement, nodes: Sequence[Node], rank: tuple[Any, ...]) -> _Choice:
    need = placement.bundle()
    room = sum(_count(need, node.total) for node in nodes)
    free = sum(_count(need, node.total if node.free is None else node.free) for node in nodes)
    return _Choice(placement, room, free, rank, tuple(node for node in nodes if _count(need, node.total)))


def _count(need: dict[str, float], have: Any) -> int:
    """How many workers of ``need`` a node with ``have`` holds at once."""
    if not any(need.values()):
        return 1_000_000
    return min(math.floor(have.get(name, 0.0) / amount + ENOUGH) for name, amount in need.items() if amount)


def lacking(bundle: dict[str, float], label_selector: dict[str, str], nodes: Sequence[Node]) -> str:
    """What of ``bundle`` is not free on the nodes that could hold it; empty where one could take it now."""
    where = [
        node
        for node in nodes
        if _count({**bundle, "memory": 0.0}, node.total)
        and _selects(label_selector.get(HOST, node.host), node.host)
        and _selects(label_selector.get(NODE, node.unlabelled), node.unlabelled)
    ]
    short = {node.host: _short(bundle, node) for node in where}
    if not where:
        return "no host that is up has it"
    return "" if "" in short.values() else "; ".join(f"{host} has {text}" for host, text in short.items())


def _selects(selector: str, host: str) -> bool:
    """Whether a label selector on the host's name or Ray's id, one of ours, takes ``host``."""
    return host in selector.removeprefix("in(").removesuffix(")").split(",")


def _short(need: dict[str, float], node: Node) -> str:
    """What ``node`` has too little free of, where that is known."""
    free = node.total if node.free is None else node.free
    return ", ".join(
        f"{max(0.0, free.get(name, 0.0)):g} of {node.total.get(name, 0.0):g} {name} free"
        for name, amount in need.items()
        if name != "memory" and free.get(name, 0.0) + ENOUGH < amount
    )


def _waiting(request: ResourceRequest, choice: _Choice, workers: int) -> str:
    """What is not free, host by host."""
    need = choice.placement.bundle()
    lacks = [f"{node.host} has {_short(need, node) or 'room for some'}" for node in choice.where]
    count = f"{workers} x " if workers > 1 else ""
    return f"waits for {count}{request}: {'; '.join(lacks)}"


def _no_host(host: str, nodes: Sequence[Node]) -> str:
    names = sorted(node.host for node in nodes)
    near = difflib.get_close_matches(host, names, 1)
    return f"no host '{host}' in this cluster" + (
        f"; did you mean {near[0]}?" if near else f"; it has {', '.join(names) or 'none'}"
    )


def _refusal(request: ResourceRequest, nodes: Sequence[Node], workers: int) -> str:
    """Why ``request`` can never be had here, and the nearest thing that can."""
    asked = f"{workers} workers of {request}" if workers > 1 else str(request)
    if request.all_on:
        return _refusal_of_all(request, nodes, workers)
    have = [node for node in nodes if not request.host or node.host == request.host]
    place_ = f" on {request.host}" if request.host else ""
    if request.gpu is not None and (request.gpu.model or request.gpu.memory):
        alone = request.model_copy(update={"cpu": None})
        if any(choice.room for choice in _choices(alone, nodes, 1)):
            return (
                f"{asked} cannot be had at once: {_rooms(alone, have)}; ask for fewer workers (workers=1), or less CPU"
            )
        return f"no host has {asked}; {_nearest_card(request, nodes)}"
    if request.mps:
        macs = [node.host for node in nodes if node.total.get(MPS)]
        return f"no Apple GPU{place_} for {asked}; " + (f"{', '.join(macs)} has one" if macs else _cards_text(nodes))
    if request.device == "cuda" and not any(node.total.get("GPU") for node in have):
        return f"no plain card{place_} for {asked}; {_cards_text(nodes)}"
    return f"no room for {asked}, even when all is idle: {_rooms(request, have)}"


def _refusal_of_all(request: ResourceRequest, nodes: Sequence[Node], workers: int) -> str:
    node = next((node for node in nodes if node.host == request.all_on), None)
    if node is None:
        return _no_host(request.all_on, nodes)
    if not node.cards:
        return f"'{node.host}' has no named cards; {_cards_text(nodes)}"
    if workers not in (1, len(node.cards)):
        return f"all on {node.host} is {len(node.cards)} cards for {workers} workers: give workers={len(node.cards)}"
    return f"no room for {request}, even when all is idle: {_rooms(request, [node])}"


def _nearest_card(request: ResourceRequest, nodes: Sequence[Node]) -> str:
    need = request.gpu
    assert need is not None
    cards = [(card, node.host) for node in nodes for card in node.cards]
    if not cards:
        return _cards_text(nodes)
    if elsewhere := [(card, host) for card, host in cards if _fits(request, card)]:
        return f"{elsewhere[0][0].model} is on {elsewhere[0][1]}"
    if need.model and (close := difflib.get_close_matches(need.model, [card.model for card, _ in cards], 1)):
        near = close[0]
    else:
        near = max(cards, key=lambda pair: pair[0].memory_gb)[0].model
    card, host = next(pair for pair in cards if pair[0].model == near)
    return f"the nearest is {card.model} ({card.memory_gb:g} GB) on {host}"


def _cards_text(nodes: Sequence[Node]) -> str:
    """The cards of the cluster in one line."""
    named = [f"{card.model} on {node.host}" for node in nodes for card in node.cards]
    unnamed = [
        f"{node.total['GPU']:g} GPU without a name on {node.host}"
        for node in nodes
        if not node.cards and node.total.get("GPU")
    ]
    macs = [f"mps on {node.host}" for node in nodes if node.total.get(MPS)]
    return "there is " + (", ".join([*named, *unnamed, *macs]) or "no card in this cluster")


def _rooms(request: ResourceRequest, nodes: Sequence[Node]) -> str:
    """What the hosts have of the resources that ``request`` names."""
    names = list(dict.fromkeys(["CPU", *(n for c in _choices(request, nodes, 1) for n in c.placement.bundle())]))
    return (
        "; ".join(
            f"{node.host} has " + ", ".join(f"{node.total.get(name, 0.0):g} {name}" for name in names) for node in nodes
        )
        or "no host is up"
    )
