"""What a decoder-only model must compute and move: operations and bytes of a prefill, a decode step, a training step.

The counts are the least that the task needs: each weight is read once a pass, activations stay in the caches, and of
quantised weights the bits alone are read, without their scales. Operations are those of Kaplan et al. 2020
(arXiv:2001.08361), 2 a weight and token, and of attention, causal where it may be.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling.reasons import reason
from workbench.errors import UserError

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The keys of a config that may say how many experts a layer has."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes to and from memory."""

    operations: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    def seconds_at(self, rate: float, bandwidth: float) -> float:
        """The least time on a machine of so many operations and bytes a second: the roof."""
        return max(self.operations / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class ModelShape:
    """Numbers that decide the work. ``weights`` are those that a token is multiplied with, the ``head`` of the
    vocabulary among them; ``all_weights`` include the embeddings and every expert. ``experts`` are the weights of all
    experts, of which a token takes the share ``taken``. ``width`` is heads times head size. ``number_bytes`` are those
    of a number, ``weight_bytes`` those of a weight of the layers."""

    weights: float
    all_weights: float
    layers: int
    width: int
    key_value_width: int
    number_bytes: int
    weight_bytes: float
    head: float = 0.0
    experts: float = 0.0
    taken: float = 1.0

    @property
    def quantised(self) -> bool:
        """Whether the weights of the layers are kept in fewer bits than a number."""
        return self.weight_bytes < self.number_bytes

    @property
    def cache_bytes(self) -> float:
        """Bytes that a token leaves in the key-value cache."""
        return 2.0 * self.layers * self.key_value_width * self.number_bytes

    def prefill(self, sequences: int, tokens: int) -> Work:
        """Prompts of ``tokens`` each, all at once, and the logits of the last token of each."""
        every = sequences * tokens
        operations = self._forward(sequences, tokens) - 2 * self.head * (every - sequences)
        return Work(operations, self._read(every) + every * self.cache_bytes)

    def decode(self, sequences: int, context: int) -> Work:
        """One token for each of ``sequences`` that have ``context`` tokens behind them."""
        operations = sequences * (2 * self.weights + 4.0 * self.layers * self.width * context)
        return Work(operations, self._read(sequences) + sequences * context * self.cache_bytes)

    def training(self, sequences: int, tokens: int) -> Work:
        """Forward, backward and AdamW of all weights: weights read twice, gradients written and read, and weights and
        two moments of their type read and written."""
        return Work(3 * self._forward(sequences, tokens), self.all_weights * 10.0 * self.number_bytes)

    def _forward(self, sequences: int, tokens: int) -> float:
        """Operations that lead to the logits of every token."""
        return 2 * self.weights * sequences * tokens + 2.0 * self.layers * self.width * sequences * tokens**2

    def _read(self, tokens: int) -> float:
        """Bytes of the weights that a pass over ``tokens`` reads: of the experts those that any token takes, as many
        as are expected where each token draws its own."""
        drawn = self.experts * (1 - (1 - self.taken) ** tokens)
        layers = self.weights - self.head - self.experts * self.taken + drawn
        return layers * self.weight_bytes + self.head * self.number_bytes


def read_shape(model: Path, number_bytes: int) -> tuple[ModelShape, Any]:
    """The shape of the model of a folder's ``config.json``, and its config. Nothing but the config is read.

    Raises UserError where there is none, Transformers does not know it, it is no transformer whose attention and
    experts are counted here, or its weights are quantised by an unknown method.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(model), local_files_only=True)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model}: no decoder-only model that Transformers knows: {reason(error)}") from None
    bits = _bits(model, getattr(config, "quantization_config", None))
    try:
        shape = _shape(built, config.get_text_config(decoder=True), number_bytes, bits)
    except AttributeError as error:
        raise UserError(
            f"{model}: '{config.model_type}' is no transformer whose work is known ({reason(error)}): give a "
            "model whose layers are attention and MLP, or experts"
        ) from None
    return shape, config


def _shape(built: Any, text: Any, number_bytes: int, bits: float | None) -> ModelShape:
    """Counted on the model itself. Raises AttributeError where its config lacks what attention and experts have."""
    from torch import nn

    every = dict(built.named_parameters())
    head, table = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    looked_up = {id(one) for part in built.modules() if isinstance(part, nn.Embedding) for one in part.parameters()}
    experts = sum(one.numel() for name, one in every.items() if ".experts" in name)
    count = next((found for key in EXPERTS if (found := getattr(text, key, None))), 1)
    if (count > 1) != (experts > 0):
        raise AttributeError("its experts are not found")
    taken = text.num_experts_per_tok / count if experts else 1.0
    weights = sum(one.numel() for one in every.values() if id(one) not in looked_up | {id(table)})
    if head is table:
        weights += head.numel()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelShape(
        weights - experts * (1 - taken),
        sum(one.numel() for one in every.values()),
        text.num_hidden_layers,
        text.num_attention_heads * size,
        kept * size,
        number_bytes,
        weight_bytes=number_bytes if bits is None else bits / 8,
        head=head.numel(),
        experts=experts,
        taken=taken,
    )


def _bits(model: Path, told: dict[str, Any] | None) -> float | None:
    """Of a weight, by the config's ``quantization_config``; None where there is none. Raises UserError where it does
    not say."""
    if told is None:
        return None
    groups = told.get("config_groups") or {}
    widths = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
    method = told.get("quant_method")
    known = {
        "bitsandbytes": 4 if told.get("load_in_4bit") else 8 if told.get("load_in_8bit") else None,
        "gptq": told.get("bits"),
        "awq": told.get("bits"),
        "fp8": 8,
        "compressed-tensors": widths.pop() if len(widths) == 1 else None,
    }
    bits = known.get(str(method))
    if not bits:
        raise UserError(
            f"{model}: quantization_config does not say how many bits a weight has ({method}): known are "
            f"{', '.join(known)}; or give the model before it was quantised"
        )
    return float(bits)
