"""What it takes to serve a model, before anything is loaded: bytes, KV cache, and what fits where in which split.

    workbench serve plan Qwen/Qwen3-32B-AWQ
    workbench serve plan runs/train-sft/latest 'cards=[rtx-5090:32, rtx-pro-6000:96]' lengths=[4096,32768]

Needs no Ray and no card: a folder's safetensors headers, or a ``config.json`` alone. All of it is an estimate; what is
counted is told in ``model_size.py``, how it is divided in ``split.py``.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from serve.cards import SIZES_GB, inventory_cards, named_card
from serve.model_size import IN_FLIGHT, ModelSize, read_size
from serve.source import model_source
from serve.split import GIB, Card, Fit, Rank, Serving, Split, fit, layers_by_memory, objection
from workbench.config import Config, InputPath
from workbench.files import write_json
from workbench.runs import Run, Summary


class PlanConfig(Config):
    """A model, how it would be served, and the cards."""

    source: Annotated[str, AfterValidator(model_source)] = Field(
        description="Model folder, run folder, GGUF file, or hub name (owner/model)"
    )
    cards: list[str] | None = Field(
        default=None, description="Cards of one host as MODEL:GB; default: those of the inventory, host by host"
    )
    inventory: InputPath | None = Field(default=None, description="cluster.yaml; default: the one in use")
    lengths: list[int] = Field(default=[4096, 32768], min_length=1, description="Tokens of a sequence to plan for")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(default="auto", description="Of the computation")
    cache_dtype: Literal["auto", "fp8"] = Field(default="auto", description="Of the KV cache (kv_cache_dtype)")
    quantization: Literal["", "fp8_per_tensor", "fp8_per_channel", "int8_per_channel_weight_only"] = Field(
        default="", description="Quantise to this while loading (engine.quantization)"
    )
    utilization: float = Field(default=0.92, gt=0, le=1, description="Share of a card (gpu_memory_utilization)")


def run(config: PlanConfig, run: Run) -> Summary:
    """Size the model and try every split on the cards. Raises UserError for what is no model."""
    size = read_size(config.source, config.dtype, config.quantization)
    hosts = (
        {"given": [named_card(text) for text in config.cards]} if config.cards else inventory_cards(config.inventory)
    )
    if not hosts:
        hosts = {f"{gb} GB": [named_card(str(gb))] for gb in SIZES_GB}
    lengths = [min(length, size.context or length) for length in config.lengths]
    serving = [Serving(length, config.utilization, config.cache_dtype) for length in sorted(set(lengths))]
    rows, ranks = plans(size, hosts, serving)
    run.input("model", source=config.source)
    write_json(run.artifact("ranks.json"), ranks)
    run.say(
        f"{size.parameters:,} parameters ({size.active:,} of them met by a token), "
        f"{(size.bytes + size.scales) / GIB:.2f} GiB. What follows is an estimate:"
    )
    run.report.table("Model", [_facts(size)], note="Counted from the files, or from config.json.")
    run.report.table(
        "KV cache of one sequence",
        [{"tokens": how.length, "GiB": size.kv_bytes(how.length, how.cache_dtype) / GIB} for how in serving],
        note=f"Of layers with a sliding window the window and {IN_FLIGHT:,} tokens in flight, which vLLM keeps room "
        "for; below, as many as are vLLM's default on the cards.",
    )
    run.report.table(
        "What fits where",
        rows,
        note="An estimate. Tokens a second: of one sequence, the bound that memory bandwidth sets by the makers' data "
        "sheets; nothing else takes time in it.",
    )
    run.report.table("Bytes of each rank", ranks)
    return {
        "splits": rows,
        **_facts(size),
        **{f"kv_{how.length}_bytes": size.kv_bytes(how.length, how.cache_dtype) for how in serving},
        "estimate": True,
        "fits": sum(row["sequences"] > 0 for row in rows),
    }


def _facts(size: ModelSize) -> dict[str, Any]:
    facts = {
        "parameters": size.parameters, "active_parameters": size.active, "weights_bytes": size.bytes,
        "scales_bytes": size.scales, "layers": size.layers, "kv_token_bytes": size.kv_bytes(1),
        "context": size.context, "format": size.format or size.dtype,
    }  # fmt: skip
    return facts | ({"experts": size.experts, "experts_a_token": size.chosen} if size.experts else {})


def plans(
    size: ModelSize, hosts: dict[str, list[Card]], serving: Sequence[Serving]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for every split of ``size`` on the cards (alone, over those of a host, over those of all hosts), and a row
    for each of their ranks, in bytes."""
    rows, ranks = [], []
    for how in serving:
        for cards, split in splits(size, hosts, how):
            refused = objection(size, split)
            found = None if refused else fit(size, split, cards, how)
            about = {"tokens": how.length, "cards": " + ".join(card.name for card in cards), "split": str(split)}
            rows.append({
                **about,
                "fits": refused or verdict(found, how),
                "sequences": found.sequences if found else 0,
                "tokens_per_s_bound": round(found.tokens_per_s, 1) if found and found.holds else 0.0,
            })  # fmt: skip
            ranks += [{**about, **_rank(rank)} for rank in (found.ranks if found else ())]
    return rows, ranks


def _rank(rank: Rank) -> dict[str, Any]:
    return {
        "card": rank.card.name, "stage": rank.stage, "weights": rank.weights, "scales": rank.scales,
        "experts_a_layer": rank.experts, "kv_sequence": rank.kv_sequence, "left_for_cache": rank.spare,
    }  # fmt: skip


def verdict(found: Fit | None, serving: Serving) -> str:
    """Whether a split fits, in words: what is left, or what lacks and where."""
    if found is None:
        return ""
    if not found.holds:
        return "no: " + found.tightest.arithmetic(serving)
    most = f"{found.sequences:,} sequences" if found.sequences > 1 else "1 sequence"
    speed = f", at most {found.tokens_per_s:,.0f} tokens/s each (estimate)" if found.tokens_per_s else ""
    return f"yes: {most} at once{speed}"


def splits(size: ModelSize, hosts: dict[str, list[Card]], serving: Serving) -> Iterator[tuple[list[Card], Split]]:
    """Every way to try: each kind of card alone, the cards of a host by tensor, pipeline and expert parallelism, the
    cards of all hosts as a pipeline (tensor parallelism between hosts would wait for the network at each layer)."""
    whole = (size.layers,)
    alone = dict.fromkeys(card for cards in hosts.values() for card in cards)
    for card in alone:
        yield [card], Split(whole)
    for cards in hosts.values():
        if len(cards) > 1:
            yield cards, Split(whole, tensor=len(cards))
            yield from _pipeline(size, cards, serving)
            if size.experts:
                yield cards, Split(whole, data=len(cards), expert=True)
                yield cards, Split(whole, tensor=len(cards), expert=True)
    every = [card for cards in hosts.values() for card in cards]
    if len(hosts) > 1 and len(every) <= size.layers and all(len(card.name.split(" on ")) == 2 for card in every):
        yield from _pipeline(size, every, serving)


def _pipeline(size: ModelSize, cards: Sequence[Card], serving: Serving) -> Iterator[tuple[list[Card], Split]]:
    if len(cards) <= size.layers:
        yield list(cards), Split(layers_by_memory(size, cards, serving))
