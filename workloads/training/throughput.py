"""How fast training is and what it takes: tokens per second, model FLOP utilisation, peak memory.

Model FLOP utilisation is Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B: the operations that the model
needs, not those that recomputed activations add, over what the cards could do.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from workloads.training.batches import Row
from workloads.training.nf4 import NF4Stack

PEAK_BFLOAT16 = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "RTX PRO 6000 Blackwell Max-Q": 439e12,
    "RTX PRO 6000 Blackwell": 504e12,
    "RTX 5090": 209.5e12,
    "RTX 5060 Ti": 47.4e12,
}
"""Dense bfloat16 operations a second with sums in float32, as NVIDIA's data sheets give them; the first name that a
card's own name contains counts."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second that ``device`` can do in ``dtype``; None where that is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK_BFLOAT16.items() if card in name), None)


def weight_flops(model: nn.Module) -> float:
    """Operations that a token costs in the weights, forward and backward.

    6 a weight: 2 forward, 2 for the gradient of its input, 2 for its own, which a frozen weight does not have. Looking
    up an embedding costs none; of a layer's experts only those that a token visits count.
    """
    from transformers.pytorch_utils import Conv1D

    config = _decoder_config(model)
    experts = next((getattr(config, key) for key in ("num_local_experts", "num_experts") if hasattr(config, key)), 0)
    visited = getattr(config, "num_experts_per_tok", 0) / experts if experts else 1.0
    matrices: list[tuple[str, float, bool]] = []
    for name, module in model.named_modules():
        if isinstance(module, NF4Stack):
            matrices.append((name, math.prod(module.shape), False))
        elif hasattr(module, "in_features") and not hasattr(module, "base_layer"):  # an adapted layer has its parts
            weight: Any = module.weight
            matrices.append((name, module.in_features * module.out_features, weight.requires_grad))
        elif isinstance(module, Conv1D):  # GPT-2's linear layer
            matrices.append((name, module.nx * module.nf, module.weight.requires_grad))
    for name, stack in model.named_parameters():
        shape = getattr(stack, "ds_shape", stack.shape)  # under ZeRO-3 a parameter itself is empty
        if len(shape) == 3:
            matrices.append((name, math.prod(shape), stack.requires_grad))
    return sum(
        (visited if ".experts" in name else 1.0) * size * (6 if trained else 4) for name, size, trained in matrices
    )


def head_flops(model: nn.Module) -> float:
    """The head's part of ``weight_flops``, which a token that is not learned does not cost."""
    head: Any = model.get_output_embeddings()
    return float(head.in_features * head.out_features * (6 if head.weight.requires_grad else 4))


def step_flops(rows: Sequence[Row], per_weight: float, per_context: float, per_target: float) -> float:
    """Operations of a step over ``rows``, by ``weight_flops``, ``attention_flops`` and ``head_flops`` of a model."""
    flops = 0.0
    for row in rows:
        edges = sorted({0, *row.starts, len(row.ids)})
        flops += len(row.ids) * (per_weight - per_target) + row.targets * per_target
        flops += per_context * sum((end - start) ** 2 for start, end in pairwise(edges))
    return flops


def attention_flops(model: nn.Module) -> float:
    """Operations that attention costs a token, forward and backward, for each token of its sequence."""
    config = _decoder_config(model)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 12.0 * config.num_hidden_layers * width


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a card, or elsewhere the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Counts the tokens of training steps and the seconds they take; checkpoints count, time ``aside`` does not."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: str) -> None:
        self._device, self._peak = device, peak_flops(device, dtype)
        if self._peak:
            self._costs = weight_flops(model), attention_flops(model), head_flops(model)
        self._restart()

    def add(self, rows: Sequence[Row]) -> None:
        """A step over ``rows``, the batch of all ranks."""
        self._tokens += sum(len(row.ids) for row in rows)
        if self._peak:
            self._flops += step_flops(rows, *self._costs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no training: validation and samples."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._begun += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Since the last call: tokens a second without padding, over all ranks; model FLOP utilisation where the cards
        are known; and the peak memory of each rank in GiB. Collective."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        seconds = time.perf_counter() - self._begun
        ranks = torch.zeros((world, 2), device=self._device)
        ranks[rank] = torch.tensor((peak_memory(self._device) / 2**30, (self._peak or 0.0) / 1e12))
        if dist.is_initialized():
            dist.all_reduce(ranks)
        memory, peaks = ranks.T.tolist()
        values = {"tokens_per_second": self._tokens / seconds}
        if all(peaks):
            values["model_flop_utilisation"] = self._flops / seconds / (sum(peaks) * 1e12)
        values |= {f"peak_memory_gib/rank_{index}": gib for index, gib in enumerate(memory)}
        self._restart()
        return values

    def _restart(self) -> None:
        self._begun = time.perf_counter()
        self._tokens, self._flops = 0, 0.0


def _decoder_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
