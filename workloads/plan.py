"""``--plan`` of ``train sft``, ``dpo`` and ``pretrain``: what a run will need of each card, before anything is loaded.

    workbench train sft configs/sft.yaml --plan

Needs no Ray, no card and no weights: the base's ``config.json`` alone. It is an estimate, for rows as long as
``max_length`` allows. What is counted, and how, says ``training/memory_plan.py``. The commands themselves ask the same
estimate whether their workers' cards can hold it.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import Failure, UserError
from workloads.dpo import DpoConfig
from workloads.pretrain import PretrainConfig
from workloads.sft import TuningConfig
from workloads.sources import read_config, read_tokenizer
from workloads.training.config import DistillConfig, TrainingConfig

if TYPE_CHECKING:
    from cluster.nodes import Node
    from workloads.training.chunked_loss import LossFunction
    from workloads.training.memory_plan import MemoryPlan
    from workloads.training.step_trace import Step

GIB = 1 << 30
SIZES_GB = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Cards by their memory, where no inventory names any."""


@dataclass(frozen=True)
class Card:
    """A card by name and the GB on its box, which are GiB."""

    name: str
    memory_gb: float

    def holds(self, plan: "MemoryPlan") -> str:
        """yes, tight (the tensors alone fit), or no."""
        if plan.card <= self.memory_gb * GIB:
            return "yes"
        return "tight" if plan.peak <= self.memory_gb * GIB else "no"


@dataclass(frozen=True)
class RunPlan:
    """The estimate for a config, beside the cards that are known; ``about`` says what a step was taken to be, and
    ``ends`` has the bytes of a card by the most and the least workers, where these differ: ``memory`` is the larger."""

    memory: "MemoryPlan"
    cards: list[Card]
    about: str
    ends: dict[int, int]

    def text(self) -> str:
        """For the terminal: a table by part, one by phase, and the cards."""
        from workloads.training.memory_plan import CONTEXT, FRAGMENTATION, PARTS

        plan = self.memory
        who = "the one rank" if plan.ranks == 1 else f"each of {plan.ranks} ranks"
        lines = [
            f"an estimate, for {self.about}",
            f"{plan.parameters:,} parameters, {plan.trained:,} of them trained",
            "",
            f"{who} holds at most (in phase: {plan.phase})",
            *(f"  {PARTS[part]:<40}{_gib(size)}" for part, size in plan.parts.items()),
            f"  {'tensors':<40}{_gib(plan.peak)}",
            f"  {'assumed: CUDA, kernels, workspaces':<40}{_gib(CONTEXT)}",
            f"  {f'assumed: fragmentation, {FRAGMENTATION:.0%}':<40}{_gib(int(plan.peak * FRAGMENTATION))}",
            f"  {'the smallest card must hold':<40}{_gib(plan.card)}",
            *([f"  {'and in the memory of its host':<40}{_gib(plan.host)}"] if plan.host else []),
            *(f"  {f'with {count} workers':<40}{_gib(size)}" for count, size in self.ends.items()),
            "",
            "tensors at the highest moment of each phase",
            *(f"  {phase:<40}{_gib(size)}" for phase, size in plan.phases.items()),
            "",
            "fits on",
            *(f"  {card.name:<40}{card.memory_gb:>6g} GB   {card.holds(plan)}" for card in self.cards),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All of it in bytes."""
        plan = self.memory
        return {
            "estimate": True, "about": self.about, "ranks": plan.ranks, "parameters": plan.parameters,
            "trained_parameters": plan.trained, "phase": plan.phase, "phases": plan.phases, "parts": plan.parts,
            "tensor_bytes": plan.peak, "card_bytes": plan.card, "host_bytes": plan.host,
            "card_bytes_by_workers": self.ends,
            "cards": [{"card": c.name, "memory_gb": c.memory_gb, "fits": c.holds(plan)} for c in self.cards],
        }  # fmt: skip


@dataclass(frozen=True)
class _Tokens:
    """As much of a tokenizer that is not trained yet as the model's shape needs."""

    count: int
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __len__(self) -> int:
        return self.count


def _gib(size: int) -> str:
    return f"{size / GIB:>8.2f} GiB"


def plan_run(config: TrainingConfig) -> RunPlan:
    """The plan of a ``train`` command's config. Raises UserError for a base that cannot be trained."""
    plans = [(_estimate(each), each) for each in _ends(config)]
    memory, worst = max(plans, key=lambda plan: plan[0].peak)
    ends = {each.workers: plan.card for plan, each in plans} if len(plans) > 1 else {}
    return RunPlan(memory, known_cards(), _about(worst), ends)


def estimate(config: TrainingConfig) -> "MemoryPlan":
    """What each rank of ``config`` needs, with as many workers as need the most.

    Raises UserError for a teacher that cannot be read, Failure for a model whose code asks for the values of tensors.
    """
    return max(map(_estimate, _ends(config)), key=lambda plan: plan.peak)


def _ends(config: TrainingConfig) -> list[TrainingConfig]:
    """``config`` with the most workers and, where that is another number, with the least that it goes on with."""
    least = config.least_workers or config.workers
    return [config.model_copy(update={"workers": count}) for count in dict.fromkeys((config.workers, least))]


def _estimate(config: TrainingConfig) -> "MemoryPlan":
    from workloads.training.memory_plan import plan_memory

    make, step = _setting(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and torch's are told when it trains
        try:
            micro_batches = math.ceil(_share(config) / (config.micro_batch_size or _share(config)))
            return plan_memory(
                make, step, ranks=config.workers, micro_batches=micro_batches, teacher=_teacher(config)
            )  # fmt: skip
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Failure(f"no plan: the model cannot be run without its weights ({reason})") from error


def _setting(config: TrainingConfig) -> tuple[Callable[[], Any], "Step"]:
    import torch

    from workloads.training.step_trace import Step

    computed = getattr(torch, config.compute_dtype)
    rows = min(config.micro_batch_size or _share(config), _share(config))
    sharded = config.strategy != "single"
    common: dict[str, Any] = {
        "rows": rows, "checkpointing": config.gradient_checkpointing, "sharded": sharded,
        "offloaded": config.strategy == "fsdp2-offload", "zero_stage": config.zero_stage,
        "loss": _loss(config), "loss_chunk": config.loss_chunk,
        "device": "cuda" if config.gpus_per_worker else "cpu",
    }  # fmt: skip
    if isinstance(config, TuningConfig):
        from workloads.training.adapters import empty_model
        from workloads.training.nf4 import stacked_experts

        base, packing, pairs = config.base, getattr(config, "packing", False), isinstance(config, DpoConfig)
        common["rows"] *= 2 if pairs else 1
        return lambda: empty_model(base), Step(
            **common, length=config.max_length, masked=packing or common["rows"] > 1, pairs=pairs,
            adapter=config.adapter if config.method == "lora" else None, quantized=config.quantization == "nf4",
            pieces=config.strategy.startswith("fsdp2") and not stacked_experts(empty_model(base)),
            stored=computed, computed=computed,
        )  # fmt: skip
    assert isinstance(config, PretrainConfig)
    from workloads.pretraining import llama_config
    from workloads.training.transformer import Transformer

    tokens: Any = _Tokens(config.vocabulary)
    if config.distill is not None:
        tokens = read_tokenizer("distill.teacher", config.distill.teacher)
    shape = llama_config(config, tokens)
    return lambda: Transformer(shape), Step(**common, length=config.max_length, stored=torch.float32, computed=computed)


def _loss(config: TrainingConfig) -> "LossFunction":
    """What is minimised."""
    from workloads.training.losses import training_loss
    from workloads.training.memory_plan import mixture

    distill: DistillConfig | None = getattr(config, "distill", None)
    return training_loss(config) if distill is None else mixture(distill)


def _teacher(config: TrainingConfig) -> Callable[[], Any] | None:
    from workloads.training.adapters import empty_model

    distill: DistillConfig | None = getattr(config, "distill", None)
    if distill is None:
        return None
    read_config("distill.teacher", distill.teacher)  # raises what a user can mend
    return lambda: empty_model(distill.teacher)


def _share(config: TrainingConfig) -> int:
    """Sequences of a rank in one step."""
    return config.batch_size // config.workers


def _about(config: TrainingConfig) -> str:
    rows = min(config.micro_batch_size or _share(config), _share(config))
    length: int = getattr(config, "max_length", 0)
    what = "pairs of" if isinstance(config, DpoConfig) else "x"
    about = f"{rows} {what} {length} tokens at once on each rank, {config.compute_dtype}"
    about += ", activations recomputed" if config.gradient_checkpointing else ", activations kept"
    about += f", {config.strategy} over {config.workers}"
    if getattr(config, "distill", None) is not None:
        about += ", with a teacher"
    return about + ("; compiled layers are taken as uncompiled" if config.compile else "")


def known_cards() -> list[Card]:
    """The cards of the inventory in use, or usual sizes where there is none."""
    from cluster.client_state import inventory_in_use

    try:
        inventory, _ = inventory_in_use(None)
    except UserError:
        return [Card("a card", size) for size in SIZES_GB]
    return [Card(f"{card.model} on {name}", card.memory_gb) for name, host in inventory.hosts.items()
            for card in host.cards]  # fmt: skip


def check_memory(config: TrainingConfig, nodes: "Sequence[Node]", say: Callable[[str], Any]) -> int:
    """Refuse a run whose workers are sure to get a card that cannot hold their tensors; ``say`` hears of doubts.

    Returns the bytes of tensors that each card must hold, for ``devices.check_cards`` on the cards that the workers
    got; 0 on CPUs and Apple GPUs, and where there is no estimate. Nothing is refused here where the memory of a card
    that a worker may get is not known. Raises UserError with what would fit.
    """
    request = config.request()
    if request.device != "cuda":
        return 0
    try:
        plan = estimate(config)
    except Failure as error:
        say(f"{error}; whether it fits will be seen")
        return 0
    cards = candidates(config, nodes)
    if not cards:
        return plan.peak
    share = min(1.0, request.gpu_share)
    by_size = sorted(cards, key=lambda card: card.memory_gb)
    # Of cards that are all taken the smallest counts, of a choice the smallest of the largest that are enough.
    needed = len(cards) if request.all_on else math.ceil(config.workers * share)
    smallest = by_size[-min(needed, len(by_size))]
    offered = f"{smallest.name} has {smallest.memory_gb:g} GB" + (f", {share:g} of it for a worker" * (share < 1))
    needs = f"each worker needs {plan.card / GIB:.1f} GiB (estimated, {plan.peak / GIB:.1f} of them tensors)"
    if plan.peak > smallest.memory_gb * share * GIB:
        raise UserError(f"{needs}, and {offered}: {_remedy(config, smallest.memory_gb * share)}")
    if plan.card > smallest.memory_gb * share * GIB:
        say(f"tight: {needs}, and {offered}")
    elif plan.card > by_size[0].memory_gb * share * GIB:
        say(f'{needs}: more than {by_size[0].name} has, which one may get; ask for resources.gpu.memory=">='
            f'{smallest.memory_gb:g}GB"')  # fmt: skip
    return plan.peak


def candidates(config: TrainingConfig, nodes: "Sequence[Node]") -> list[Card]:
    """The cards that workers of ``config`` may get; none where one of them has no known memory."""
    request = config.request()
    if request.device != "cuda":
        return []
    hosts = [node for node in nodes if node.host == (request.all_on or request.host or node.host)]
    need = request.gpu
    named = need is not None and bool(need.model or need.memory)
    if not named and not request.all_on and any(node.total.get("GPU") and not node.cards for node in hosts):
        return []
    found = []
    for node in hosts:
        for card in node.cards:
            fits = need is None or (need.model in ("", card.model) and card.memory_gb >= need.memory_gb)
            if fits and (named or request.all_on or not card.reserved):
                found.append(Card(f"{card.model} on {node.host}", card.memory_gb))
    return found if all(card.memory_gb for card in found) else []


def _remedy(config: TrainingConfig, memory_gb: float) -> str:
    """The first change of the config that fits into ``memory_gb``, as it is typed."""
    length: int = getattr(config, "max_length", 0)
    least = config.least_workers or config.workers
    changes: list[dict[str, Any]] = [
        *({"least_workers": count} for count in range(least + 1, config.workers + 1)),
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "micro_batch_size": 1},
    ]
    changes += [{**changes[-1], "max_length": length // part} for part in (2, 4, 8) if length // part >= 128]
    for change in changes:
        if estimate(config.model_copy(update=change)).card <= memory_gb * GIB:
            return "give " + " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
    return "it takes a larger card, more workers or a smaller base; look with --plan"
