"""Whether a model's split fits the cards that it was given, asked before an engine starts.

The same estimate as ``serve plan``, of one split. Nothing is refused where a card's memory, or the model, is not known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.nodes import Node
from cluster.placement import Placement
from serve.cards import card_of
from serve.model_config import ModelConfig
from serve.model_size import BLOCK, ModelSize, read_size
from serve.split import GIB, Card, Fit, Serving, Split, fit, layers_by_memory, objection
from workbench.errors import UserError


@dataclass(frozen=True)
class Checked:
    """What the check found: the layers of each pipeline stage where they are not vLLM's, and the fit where the cards
    are known."""

    layers: tuple[int, ...] = ()
    fit: Fit | None = None


def check_fit(
    model: ModelConfig, placement: Placement, nodes: Sequence[Node], device: str, say: Callable[[str], Any]
) -> Checked:
    """Refuse a split that vLLM cannot make of the model, or that the cards cannot hold; ``say`` what each rank gets.

    Raises UserError with the arithmetic.
    """
    name = f"model '{model.name}'"
    utilization = float(model.engine.get("gpu_memory_utilization", 0.92))
    if device == "gpu" and utilization > model.gpus + 0.01:
        raise UserError(
            f"{name} has {model.gpus:g} of a card and takes {utilization:g} of its memory: "
            f"give engine.gpu_memory_utilization, at most {model.gpus:g}"
        )
    several = model.tensor * model.stages * model.data > 1
    try:
        size = read_size(
            model.source, str(model.engine.get("dtype", "auto")), str(model.engine.get("quantization") or "")
        )
    except UserError as error:
        if model.layers == "by memory":
            raise UserError(f"{name}: layers by memory need its size, and {error}") from None
        say(f"{name}: {error}; whether it fits will be seen")
        return Checked()
    serving = _serving(model, size)
    cards = rank_cards(model, placement, nodes) if device == "gpu" else []
    if model.layers == "by memory" and not cards:
        raise UserError(f"{name}: the memory of its cards is not known: give layers as numbers, for example [20, 44]")
    split = _split(model, size, cards, serving)
    if several and (reason := objection(size, split)):
        raise UserError(f"{name}: {reason}")
    layers = split.layers if model.layers != "even" else ()
    if not cards:
        return Checked(layers)
    found = fit(size, split, cards, serving)
    if not found.holds:
        told = found.tightest.arithmetic(serving)
        raise UserError(f"{name} does not fit ({split}). {told}. {_remedy(size, split, cards, serving)}")
    if several:
        for rank in found.ranks:
            experts = f", {rank.experts} of {size.experts} experts a layer" if size.experts else ""
            say(f"{model.name}, {split}: {rank.card.name} gets {(rank.weights + rank.scales) / GIB:.2f} GiB of weights"
                f"{experts}, {rank.spare / GIB:.2f} GiB for KV cache (estimate)")  # fmt: skip
    return Checked(layers, found)


def _serving(model: ModelConfig, size: ModelSize) -> Serving:
    engine = model.engine
    asked = engine.get("max_model_len") or size.context or 4096
    return Serving(
        length=asked if asked > 0 else BLOCK,  # -1: as long as the cards hold
        utilization=float(engine.get("gpu_memory_utilization", 0.92)),
        cache_dtype=str(engine.get("kv_cache_dtype", "auto")),
        batched_tokens=engine.get("max_num_batched_tokens") or 0,
        beside=_draft(engine.get("speculative_config")),
    )


def _draft(speculative: Any) -> int:
    """Bytes of a draft model, which every rank of the first stage may hold."""
    if not isinstance(speculative, dict) or not isinstance(speculative.get("model"), str):
        return 0
    try:
        size = read_size(speculative["model"])
    except UserError:
        return 0
    return size.bytes + size.scales


def _split(model: ModelConfig, size: ModelSize, cards: list[Card], serving: Serving) -> Split:
    stages, tensor = model.stages, model.tensor
    if isinstance(model.layers, list):
        layers = tuple(model.layers)
    elif model.layers == "by memory":
        smallest = [min(cards[s * tensor : (s + 1) * tensor], key=lambda card: card.memory_gb) for s in range(stages)]
        layers = layers_by_memory(size, smallest, serving, tensor)
    else:
        layers = vllm_layers(size.layers, stages)
    return Split(layers, tensor, model.data, model.expert)


def vllm_layers(layers: int, stages: int) -> tuple[int, ...]:
    """As vLLM divides by itself (``get_pp_indices``): evenly, what is over to the last stages but the very last."""
    counts = [layers // stages] * stages
    for index in range(2, layers % stages + 2):
        counts[-index] += 1
    return tuple(counts)


def rank_cards(model: ModelConfig, placement: Placement, nodes: Sequence[Node]) -> list[Card]:
    """The cards of one replica's ranks: those that the placement names, else the largest that it may get; none where
    too few are known."""
    ranks = model.tensor * model.stages * model.data
    if placement.cards:
        found = [card_of(card.model, card.memory_gb, placement.host) for card in placement.cards]
    else:
        named = [
            card_of(card.model, card.memory_gb, node.host)
            for node in nodes
            for card in node.cards
            if not card.reserved
            and (not placement.host or node.host == placement.host)
            and (not placement.resources or card.model in placement.resources)
        ]
        found = sorted(named, key=lambda card: -card.memory_gb)
    if len(found) < ranks or any(not card.memory_gb for card in found):
        return []
    return found[:ranks]


def _remedy(size: ModelSize, split: Split, cards: list[Card], serving: Serving) -> str:
    fits, not_fit = 0, serving.length // 256 + 1
    while not_fit - fits > 1:
        middle = (fits + not_fit) // 2
        holds = fit(size, split, cards, replace(serving, length=middle * 256)).holds
        fits, not_fit = (middle, not_fit) if holds else (fits, middle)
    if fits:
        return f"Give engine.max_model_len: {fits * 256}, or kv_cache_dtype: fp8, which halves the cache"
    return "Give more or larger cards, or quantised weights; what would fit tells 'workbench serve plan'"
