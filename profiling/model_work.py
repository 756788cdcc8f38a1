"""What a decoder-only model must compute and move: operations and bytes of a prefill, a decode step, a training step.

The counts are the least that the task needs: each weight is read once a pass, activations stay in the caches.
Operations are those of Kaplan et al. 2020 (arXiv:2001.08361), 2 a weight and token, and of attention, causal where it
may be.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError


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
    """Numbers that decide the work. ``weights`` are those that every token is multiplied with, ``all_weights`` include
    the embeddings and the experts that a token does not take; ``width`` is heads times head size."""

    weights: float
    all_weights: float
    layers: int
    width: int
    key_value_width: int
    number_bytes: int

    @property
    def cache_bytes(self) -> float:
        """Bytes that a token leaves in the key-value cache."""
        return 2.0 * self.layers * self.key_value_width * self.number_bytes

    def prefill(self, sequences: int, tokens: int) -> Work:
        """Prompts of ``tokens`` each, all at once."""
        every = sequences * tokens
        operations = 2 * self.weights * every + 2.0 * self.layers * self.width * sequences * tokens**2
        return Work(operations, self._weight_bytes() + every * self.cache_bytes)

    def decode(self, sequences: int, context: int) -> Work:
        """One token for each of ``sequences`` that have ``context`` tokens behind them."""
        operations = sequences * (2 * self.weights + 4.0 * self.layers * self.width * context)
        return Work(operations, self._weight_bytes() + sequences * context * self.cache_bytes)

    def training(self, sequences: int, tokens: int) -> Work:
        """Forward, backward and AdamW of all weights: weights read twice, gradients written and read, and weights and
        two moments of their type read and written."""
        forward = self.prefill(sequences, tokens).operations
        return Work(3 * forward, self.all_weights * 10.0 * self.number_bytes)

    def _weight_bytes(self) -> float:
        return self.weights * self.number_bytes


def read_shape(model: Path, number_bytes: int) -> tuple[ModelShape, Any]:
    """The shape of the model of a folder's ``config.json``, and its config. Nothing but the config is read.

    Raises UserError where there is none, or Transformers does not know it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(model), local_files_only=True)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{model}: no decoder-only model that Transformers knows: {str(error).splitlines()[0]}"
        ) from None
    text = config.get_text_config(decoder=True)
    experts = next((getattr(text, key) for key in ("num_local_experts", "num_experts") if hasattr(text, key)), 0)
    taken = text.num_experts_per_tok / experts if experts else 1.0
    every = {name: parameter.numel() for name, parameter in built.named_parameters()}
    looked_up = {name for name in every if "embed" in name}
    multiplied = sum(
        size * (taken if ".experts" in name else 1.0) for name, size in every.items() if name not in looked_up
    )
    if text.tie_word_embeddings:  # the table is also the head
        multiplied += text.vocab_size * text.hidden_size
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    shape = ModelShape(
        multiplied,
        sum(every.values()),
        text.num_hidden_layers,
        text.num_attention_heads * head,
        kept * head,
        number_bytes,
    )
    return shape, config
