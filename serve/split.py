"""A model divided over cards: what each rank holds of weights, scales, experts and KV cache, and where it cannot.

    split = Split(tensor=1, layers=(24, 40))
    fits = fit(size, split, [Card("rtx-5090 on system-a", 32), Card("rtx-pro-6000 on system-a", 96)], Serving(32768))

As vLLM 0.32 divides: tensor parallel by equal shares (fewer key-value heads than ranks are held several times, latent
projections and routers by every rank), pipeline stages by whole layers (``VLLM_PP_LAYER_PARTITION``), attention of a
mixture of experts whole on each data-parallel rank and its experts over all ranks: whole ones with expert parallelism,
else an equal part of each. What is counted is bytes; ``ENGINE`` is assumed, not measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve.model_size import ModelSize, Tensor

GIB = 1 << 30
ENGINE = 1 << 30
"""Bytes of a card that neither weights nor cache get: CUDA's context, kernels, graphs, NCCL's buffers. Assumed."""


@dataclass(frozen=True)
class Card:
    """A card by name, the GB on its box, which are GiB, and what its memory reads in GB/s (0: not known)."""

    name: str
    memory_gb: float
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Serving:
    """How an engine is run: tokens of a sequence, share of a card, dtype of the cache, tokens of one forward pass (0:
    vLLM's default), bytes of a draft model beside it."""

    length: int
    utilization: float = 0.92
    cache_dtype: str = "auto"
    batched_tokens: int = 0
    beside: int = 0

    def on(self, cards: Sequence[Card]) -> "Serving":
        """The same with vLLM's default of ``batched_tokens`` filled in, which goes by a card's memory; of unlike cards
        the largest, for any of them may be asked."""
        largest = max(card.memory_gb for card in cards)
        default = 16384 if largest >= 160 else 8192 if largest >= 70 else 2048
        return replace(self, batched_tokens=self.batched_tokens or default)

    def in_flight(self, stages: int) -> int:
        """Tokens that are scheduled and not yet settled: a step for each stage and, as steps overlap, one more."""
        return (stages + 1) * self.batched_tokens


@dataclass(frozen=True)
class Split:
    """Over how many ranks: ``layers`` are those of each pipeline stage, each on ``tensor`` ranks, all of it ``data``
    times."""

    layers: tuple[int, ...]
    tensor: int = 1
    data: int = 1
    expert: bool = False

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    @property
    def ranks(self) -> int:
        """Cards that it takes, of which those of a stage follow each other."""
        return self.tensor * self.stages * self.data

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}"] if self.tensor > 1 else []
        parts += [f"pipeline {self.stages} ({' + '.join(map(str, self.layers))} layers)"] if self.stages > 1 else []
        parts += [f"data {self.data}"] if self.data > 1 else []
        return ", ".join([*parts, *(["expert parallel"] if self.expert else [])]) or "one card"


@dataclass(frozen=True)
class Rank:
    """What one rank holds, in bytes, on which card; ``experts`` are those of a layer, ``spare`` what its cache gets,
    negative where it lacks even for the weights."""

    card: Card
    stage: int
    weights: int
    scales: int
    assumed: int
    kv_token: int
    kv_sequence: int
    spare: int
    experts: int = 0

    def arithmetic(self, serving: Serving) -> str:
        """How ``spare`` comes about, to read."""
        whole = self.card.memory_gb * serving.utilization
        parts = f"{_gib(self.weights)} weights" + (f" + {_gib(self.scales)} scales" if self.scales else "")
        return (
            f"{self.card.name}: {serving.utilization:g} x {self.card.memory_gb:g} = {whole:.1f} GiB, less {parts} + "
            f"{_gib(self.assumed)} assumed for the engine: {_gib(self.spare)} GiB are left; "
            f"a sequence of {serving.length:,} tokens takes {_gib(self.kv_sequence)} GiB of cache"
        )


@dataclass(frozen=True)
class Fit:
    """A split on cards: its ranks, and how many sequences of full length its cache holds at once."""

    split: Split
    ranks: tuple[Rank, ...]
    sequences: int
    tokens_per_s: float

    @property
    def holds(self) -> bool:
        """Whether a sequence of full length finds room on every rank."""
        return self.sequences > 0

    @property
    def tightest(self) -> Rank:
        """The rank that sets the limit."""
        return min(self.ranks, key=lambda rank: rank.spare / rank.kv_sequence if rank.kv_sequence else rank.spare)


def objection(size: ModelSize, split: Split) -> str:
    """Why vLLM cannot divide this model so, or empty."""
    tensor, experts = split.tensor, size.experts
    heads = max((layer.heads for layer in size.attention if layer), default=1)
    if size.heads % tensor:
        return f"{size.heads} attention heads cannot be shared by {tensor} ranks evenly"
    if heads > 1 and heads % tensor and tensor % heads:
        return f"{heads} key-value heads cannot be shared by {tensor} ranks evenly"
    if not experts and size.intermediate % tensor:
        return f"an MLP of {size.intermediate:,} cannot be shared by {tensor} ranks evenly"
    if sum(split.layers) != size.layers:
        return f"the model has {size.layers} layers, the stages {' + '.join(map(str, split.layers))}"
    if min(split.layers) < 1:
        return f"a stage without layers ({' + '.join(map(str, split.layers))})"
    if split.expert and not experts:
        return "expert parallelism is for a mixture of experts, and this model has none"
    if split.data > 1 and not experts:
        return "data parallel ranks of a model without experts are engines of their own: give replicas"
    if split.expert and experts < split.tensor * split.data:
        return f"{experts} experts for {split.tensor * split.data} ranks"
    return ""


def experts_of(size: ModelSize, split: Split) -> int:
    """Experts of a layer on the rank that has most of them."""
    if not size.experts:
        return 0
    return math.ceil(size.experts / (split.tensor * split.data)) if split.expert else size.experts


def portion(size: ModelSize, split: Split, tensor: Tensor) -> float:
    """The share of ``tensor`` that a rank of its stage holds, of the rank that has most."""
    if tensor.kind == "whole":
        return 1.0
    if tensor.kind == "expert":
        return experts_of(size, split) / size.experts if split.expert else 1 / (split.tensor * split.data)
    if tensor.kind == "heads":
        heads = max((layer.heads for layer in size.attention if layer), default=1)
        return math.ceil(heads / split.tensor) / heads
    return 1 / split.tensor


def _in_stage(size: ModelSize, split: Split, tensor: Tensor, stage: int) -> bool:
    if tensor.layer is not None:
        first = sum(split.layers[:stage])
        return first <= tensor.layer < first + split.layers[stage]
    last = stage == split.stages - 1
    if tensor.kind == "embedding" and not size.read(tensor):
        return stage == 0
    if tensor.kind == "embedding" and size.tied:
        return stage == 0 or last
    return last


def assumed(size: ModelSize, split: Split, serving: Serving) -> int:
    """Bytes that an engine takes beside weights and cache: ``ENGINE``, the activations of a forward pass (residual,
    attention and MLP in 16 bits) and the logits of 256 sequences in float32. Assumed, not measured."""
    width = 4 * size.hidden + 2 * size.intermediate // split.tensor
    return ENGINE + 2 * serving.batched_tokens * width + 4 * 256 * size.vocabulary


def fit(size: ModelSize, split: Split, cards: Sequence[Card], serving: Serving) -> Fit:
    """``split`` on ``cards``, one for each rank: the ranks of a stage follow each other, then the next stage's."""
    if len(cards) != split.ranks:
        raise ValueError(f"{len(cards)} cards for {split.ranks} ranks")
    serving = serving.on(cards)
    ranks = []
    for index, card in enumerate(cards):
        stage = index // split.tensor % split.stages
        held = [(t, portion(size, split, t)) for t in size.tensors if _in_stage(size, split, t, stage)]
        weights, scales = (round(sum(getattr(t, key) * part for t, part in held)) for key in ("bytes", "scales"))
        first = sum(split.layers[:stage])
        cached, token = (
            sum(
                size.kv_of_layer(layer, length, serving.cache_dtype, split.tensor, serving.in_flight(split.stages))
                for layer in range(first, first + split.layers[stage])
            )
            for length in (serving.length, 1)
        )
        beside = assumed(size, split, serving) + serving.beside
        spare = int(card.memory_gb * serving.utilization * GIB) - weights - scales - beside
        ranks.append(Rank(card, stage, weights, scales, beside, token, cached, spare, experts_of(size, split)))
    room = min(rank.spare // rank.kv_sequence if rank.kv_sequence else (rank.spare >= 0) * 1 for rank in ranks)
    return Fit(split, tuple(ranks), max(0, int(room)) * split.data, bound(size, split, ranks, serving.length))


def bound(size: ModelSize, split: Split, ranks: Sequence[Rank], length: int) -> float:
    """Tokens a second of one sequence of ``length`` tokens that memory bandwidth allows: each token reads what it meets
    of the weights, and its cache. An estimate from above: nothing else takes time. 0 where a card's is not known."""
    if any(not rank.card.bandwidth for rank in ranks):
        return 0.0
    seconds = 0.0
    for stage in range(split.stages):
        # The ranks of a stage read at the same time; the slowest is waited for.
        seconds += max(_read(size, split, rank) / rank.card.bandwidth / 1e9 for rank in ranks if rank.stage == stage)
    return 1 / seconds if seconds else 0.0


def _read(size: ModelSize, split: Split, rank: Rank) -> float:
    """Bytes that a rank reads for a token."""
    total = float(rank.kv_sequence)
    for tensor in size.tensors:
        if _in_stage(size, split, tensor, rank.stage) and (read := size.read(tensor)):
            shared = 1 / (split.tensor * split.data) if tensor.kind == "expert" else portion(size, split, tensor)
            total += tensor.total * read * shared
    return total


def layers_by_memory(size: ModelSize, cards: Sequence[Card], serving: Serving, tensor: int = 1) -> tuple[int, ...]:
    """Layers for each pipeline stage so that its cache holds as many tokens as can be: the stage with the least room
    sets the limit, for vLLM takes the smallest count of cache blocks of all ranks. ``cards`` is the smallest of each
    stage.

    The most tokens for which every stage still holds enough layers is found by bisection; layers that are left over
    when all have what they must hold go where most room is.
    """
    stages, serving = len(cards), serving.on(cards)
    even = Split(tuple(size.layers // stages + (i < size.layers % stages) for i in range(stages)), tensor)
    per_layer = [0] * size.layers
    for weight in size.tensors:
        if weight.layer is not None and weight.layer < size.layers:
            per_layer[weight.layer] += round(weight.total * portion(size, even, weight))
    layer = max(per_layer, default=0)
    room = []
    for stage, card in enumerate(cards):
        apart = (t for t in size.tensors if t.layer is None and _in_stage(size, even, t, stage))
        fixed = sum(round(t.total * portion(size, even, t)) for t in apart) + assumed(size, even, serving)
        room.append(int(card.memory_gb * serving.utilization * GIB) - fixed)
    cached = max(
        (
            size.kv_of_layer(i, serving.length, serving.cache_dtype, tensor, serving.in_flight(stages))
            for i in range(size.layers)
        ),
        default=0,
    )

    def holds(sequences: float) -> list[int]:
        return [max(0, int(left // max(1, layer + sequences * cached))) for left in room]

    low, high = 0.0, max(1.0, sum(room) / max(1, cached))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(holds(middle)) >= size.layers else (low, middle)
    most = holds(low)
    chosen = [min(count, size.layers) for count in most]
    while sum(chosen) > size.layers:  # what is too much is taken from the stage with the most layers
        chosen[max(range(stages), key=lambda i: chosen[i])] -= 1
    while sum(chosen) < size.layers:  # it does not fit: the fullest cards are named by ``fit``
        chosen[max(range(stages), key=lambda i: room[i] - chosen[i] * layer)] += 1
    for index in range(stages):  # vLLM wants a layer in each
        while chosen[index] < 1 and max(chosen) > 1:
            chosen[max(range(stages), key=lambda i: chosen[i])] -= 1
            chosen[index] += 1
    return tuple(chosen)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
