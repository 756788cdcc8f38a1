"""What of a base can be trained, told from its ``config.json`` before a worker starts: an empty model is enough.

coverage = examine(base, "lora", "nf4", AdapterConfig(targets=["q_proj"]), "bfloat16")
print(coverage.text())
"""

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.errors import UserError
from workloads.training.adapters import adaptable_layers, empty_model, is_named, linear_layers, target_names
from workloads.training.config import AdapterConfig
from workloads.training.nf4 import packed_bytes, stacked_experts


@dataclass(frozen=True)
class Coverage:
    """What an adapter is put on and what is quantised, in bytes of the base as it is stored."""

    adapted: dict[str, int]
    """Name of a layer (its last part) and how many of that name get an update; empty where all weights are trained."""
    total: int
    """The whole base."""
    packed: int
    """Linear layers and experts in 4 bits, with their scales."""
    experts: int
    """Stacked experts, however they are stored."""
    plain_experts: int
    """Stacked experts in full precision."""
    dtype: str

    def text(self) -> str:
        """One line a fact, for the terminal and the report."""
        on = ", ".join(f"{name} ({count})" for name, count in self.adapted.items())
        lines = [f"the adapter is on {on}" if on else "all weights are trained"]
        if self.packed:
            lines.append(f"{_mb(self.packed)} of the base's {_mb(self.total)} are 4-bit weights and their scales")
        if self.plain_experts:
            lines.append(f"experts stay in {self.dtype}: {_mb(self.plain_experts)} of {_mb(self.total)}")
        elif self.experts:
            lines.append(f"experts are in 4 bits: {_mb(self.experts)} of {_mb(self.total)}; they are not adapted")
        return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def examine(base: str, method: str, quantization: str, adapter: AdapterConfig, dtype: str) -> Coverage:
    """What training ``base`` so would adapt and quantise, in sizes of ``dtype``.

    Raises UserError for what is no decoder-only language model, for a base that is stored quantised, and for a target
    that the base does not have, with the nearest names.
    """
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise UserError(f"base: {base} holds an adapter: give the model that it was merged into, or its base")
    _check_architecture(base)
    model = empty_model(base)
    stacks = {f"{path}.{own}": getattr(module, own) for path, module, own in stacked_experts(model)}
    targets = _targets(model, stacks, adapter) if method == "lora" else []
    size = getattr(torch, dtype).itemsize
    total = sum(parameter.numel() for parameter in model.parameters()) * size
    packed = experts = plain_experts = 0
    if quantization == "nf4":
        for layer in linear_layers(model).values():
            packed += packed_bytes(layer.weight.numel())
            total += packed_bytes(layer.weight.numel()) - layer.weight.numel() * size
    for path, stack in stacks.items():
        if quantization == "nf4" and path not in targets:
            packed += packed_bytes(stack.numel())
            total += packed_bytes(stack.numel()) - stack.numel() * size
            experts += packed_bytes(stack.numel())
        else:
            experts += stack.numel() * size
            plain_experts += stack.numel() * size
    return Coverage(dict(Counter(_short(path) for path in targets)), total, packed, experts, plain_experts, dtype)


def positions_of(base: str) -> int | None:
    """Tokens of a sequence that ``base`` has learned positions for; None where positions are computed (rotary)."""
    model = empty_model(base)
    known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    # OPT's table has two more rows than positions
    return known if known is not None and any(0 <= size - known <= 2 for size in tables) else None


def _check_architecture(base: str) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(base)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"base: Transformers cannot read {base}: {str(error).strip().splitlines()[0]}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"base: {base} is an encoder-decoder ({config.model_type}): give a decoder-only model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"base: {base} ({config.model_type}) is no causal language model: give a decoder-only model")
    causal, stored = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__, config.architectures or []
    if stored and causal not in stored:
        raise UserError(f"base: {base} holds a {stored[0]}, which does not predict the next token: give a {causal}")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized.quant_method
        raise UserError(
            f"base: {base} is stored quantised already ({getattr(method, 'value', method)}): give the model that it "
            "was made from; quantization=nf4 quantises it as it is loaded"
        )


def _targets(model: Any, stacks: dict[str, Any], adapter: AdapterConfig) -> list[str]:
    """The paths of everything that the adapter is put on, in the model's order."""
    names, linear = target_names(adapter), adaptable_layers(model)
    if not names:
        return list(linear)
    modules = dict(model.named_modules())
    for name in names:
        if any(is_named(path, name) for path in (*linear, *stacks)):
            continue
        known = sorted({_short(path) for path in (*linear, *stacks)})
        if any(is_named(path, name) for path in modules):
            raise UserError(
                f"adapter.targets: '{name}' is no linear layer below the head: give some of {', '.join(known)}"
            )
        near = difflib.get_close_matches(name, [*known, *linear, *stacks], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise UserError(f"adapter.targets: the base has no layer '{name}'; {hint}")
    if adapter.dropout and any(is_named(path, name) for path in stacks for name in names):
        raise UserError("adapter.dropout: an adapter on stacked experts has none: give adapter.dropout=0")
    return [path for path in (*linear, *stacks) if any(is_named(path, name) for name in names)]


def _short(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] == ["experts"] else parts[-1]
