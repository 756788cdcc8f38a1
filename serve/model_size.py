"""How large a model is in bytes before it is loaded: its weights, the scales of quantised ones, its KV cache.

    size = read_size("runs/train-sft/latest/artifacts/merged")
    size.parameters, size.bytes, size.kv_bytes(8192)

A folder's sizes are those of the headers of its safetensors files (8 bytes of length, then JSON:
https://huggingface.co/docs/safetensors), a GGUF file's those of its tensor table. Of a ``config.json`` alone the model
is built on torch's meta device, and a linear layer that its ``quantization_config`` names is counted in its format.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from serve.weight_format import Format, quantization_of
from serve.weight_headers import headers_of, hub_headers
from workbench.errors import UserError

Kind = Literal["split", "heads", "whole", "expert", "embedding"]
"""How vLLM divides a tensor over tensor-parallel ranks: evenly, by key-value heads, not at all, by experts (or evenly
within each), by the vocabulary."""

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk|block)\.(\d+)\.")
SCALES = ("scales", "qzeros", "g_idx", "_scale", "_scale_inv", "_zero_point", "absmax", "quant_map", "quant_state",
          "weight_shape")  # fmt: skip
"""How the names of tensors end, or what is in them, that say what packed numbers mean."""
WHOLE = ("q_a_proj", "kv_a_proj", "router", "shared_expert_gate", "mlp.gate.", "block_sparse_moe.gate.")
"""Replicated by vLLM on every rank: the low-rank projections of latent attention, routers."""

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U32": 4, "U16": 2, "U64": 8}  # fmt: skip
UNCACHED = ("linear_attention", "mamba", "conv", "recurrent", "mlp", "moe")
"""Kinds of layers without a KV cache, as configs name them."""
BLOCK = 16
"""Tokens of a block of vLLM's cache."""
IN_FLIGHT = 2 * 2048
"""Tokens that are scheduled and not yet settled: two steps of vLLM's default on a card below 70 GiB."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "half": 2, "float": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model. ``parameters`` is 0 for what only describes others; ``bytes`` as it is held."""

    name: str
    parameters: int
    bytes: int
    kind: Kind
    layer: int | None
    scales: int = 0

    @property
    def total(self) -> int:
        """Bytes of the numbers and of their scales."""
        return self.bytes + self.scales


@dataclass(frozen=True)
class Attention:
    """What a token leaves in the cache of one layer: ``width`` numbers of each of ``heads``, while it is in the
    ``window`` (0: always). Latent attention has one head that is not divided."""

    heads: int
    width: int
    window: int = 0

    def tokens(self, length: int, in_flight: int) -> int:
        """Tokens that vLLM keeps room for in a sequence of ``length``: with a window, of that and of all in flight in
        whole blocks, and of one block more (``SlidingWindowSpec.max_admission_blocks_per_request``)."""
        if not self.window:
            return length
        return min(length, (math.ceil((self.window - 1 + in_flight) / BLOCK) + 1) * BLOCK)


@dataclass(frozen=True)
class ModelSize:
    """The tensors of a model, what its layers cache, and its experts: how many, and how many a token takes."""

    source: str
    tensors: tuple[Tensor, ...]
    attention: tuple[Attention | None, ...]
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    context: int
    dtype: str
    experts: int = 0
    chosen: int = 0
    tied: bool = False
    format: str = ""

    @property
    def layers(self) -> int:
        """How many layers there are to divide over pipeline stages."""
        return len(self.attention)

    @cached_property
    def parameters(self) -> int:
        """Numbers of the model, however they are packed."""
        return sum(tensor.parameters for tensor in self.tensors)

    @cached_property
    def bytes(self) -> int:
        """Bytes of weights, scales not counted."""
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def scales(self) -> int:
        """Bytes of scales, zero points and the like."""
        return sum(tensor.scales for tensor in self.tensors)

    @cached_property
    def active(self) -> int:
        """Parameters that one token meets: all but the experts it does not take and the table of embeddings, of which
        it reads one row (unless that is the head, too)."""
        return sum(round(tensor.parameters * self.read(tensor)) for tensor in self.tensors)

    def read(self, tensor: Tensor) -> float:
        """The share of ``tensor`` that is read for one token."""
        if tensor.kind == "expert":
            return self.chosen / self.experts if self.experts else 1.0
        if tensor.kind == "embedding" and not self.tied and "head" not in tensor.name and "output" not in tensor.name:
            return 0.0
        return 1.0

    def kv_bytes(self, length: int, cache_dtype: str = "auto") -> int:
        """Bytes of the cache of one sequence of ``length`` tokens on one rank."""
        return sum(self.kv_of_layer(layer, length, cache_dtype) for layer in range(self.layers))

    def kv_of_layer(
        self, layer: int, length: int, cache_dtype: str = "auto", tensor_parallel: int = 1, in_flight: int = IN_FLIGHT
    ) -> int:
        """The same of one layer, on one of ``tensor_parallel`` ranks: keys and values of fewer heads than ranks are
        held by several."""
        found = self.attention[layer]
        if found is None:
            return 0
        each = BYTES.get(cache_dtype, BYTES.get(self.dtype, 2))
        return found.tokens(length, in_flight) * math.ceil(found.heads / tensor_parallel) * found.width * each


def read_size(source: str, dtype: str = "auto", quantization: str = "") -> ModelSize:
    """The size of the model at ``source``: a folder, a ``config.json``, a GGUF file, or a name on the hub.

    ``dtype`` is what vLLM is told to compute in (``auto`` makes 16 bits of float32), ``quantization`` what it quantises
    to while it loads (``fp8_per_tensor``, ...). Raises UserError for what is no model.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        from serve.gguf_size import read_gguf

        return read_gguf(path)
    config = _config(source)
    try:
        return _size_of(source, config, dtype, quantization)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the size of '{source}', a {config.model_type}, is not known here: {reason}") from error


def _size_of(source: str, config: Any, dtype: str, quantization: str) -> ModelSize:
    path = Path(source)
    text = config.get_text_config()
    held = dtype if dtype != "auto" else str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype == "auto" and held == "float32":
        held = "bfloat16"
    packed, described = quantization_of(config, quantization)
    headers = headers_of(path if path.is_dir() else path.parent) if path.exists() else hub_headers(source)
    tied = bool(getattr(text, "tie_word_embeddings", False))
    if headers and (packed or not quantization):
        tensors = tuple(_from_headers(headers, BYTES.get(held, 2), described, tied))
    elif described.name and not described.bits:
        raise UserError(
            f"no size of the quantisation '{described.name}' is known here"
            + (": give a folder with its weights" if packed else "")
        )
    else:
        tensors = tuple(_from_config(config, BYTES.get(held, 2), described))
    wide = _first(text, "intermediate_size", "ffn_dim", "n_inner") or text.hidden_size
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    return ModelSize(
        source=source, tensors=tensors, attention=attention_of(text), vocabulary=text.vocab_size,
        hidden=text.hidden_size, intermediate=wide,
        heads=text.num_attention_heads, context=_first(text, "max_position_embeddings", "n_positions") or 0, dtype=held,
        experts=experts, chosen=_first(text, "num_experts_per_tok") if experts else 0, tied=tied,
        format=described.name,
    )  # fmt: skip


def _first(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _config(source: str) -> Any:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from transformers import AutoConfig

    try:
        if not Path(source).exists() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=10)  # once; a download tries for 23 s
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # no folder, no network, no such model, an architecture that is not known
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{source}' is no folder, config.json or hub name of a model: {reason}") from None


def attention_of(text: Any) -> tuple[Attention | None, ...]:
    """What each layer of a Transformers config caches; None for layers without attention (their state is not
    counted). A kind that is not known counts as full attention."""
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        full = Attention(1, int(rank) + int(text.qk_rope_head_dim))
    else:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        full = Attention(int(heads), 2 * int(width))
    window = getattr(text, "sliding_window", None) or 0
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    sliding = Attention(full.heads, full.width, int(window))
    kinds: dict[str, Attention | None] = {"sliding_attention": sliding, "hybrid_sliding": sliding}
    kinds |= dict.fromkeys(UNCACHED)
    return tuple(kinds.get(kind, full) for kind in types or ["full_attention"] * text.num_hidden_layers)


def tensor_kind(name: str, dimensions: int) -> Kind:
    """How vLLM divides the tensor of this name."""
    if ".experts." in name or "_exps." in name:
        return "expert"
    if dimensions < 2 or any(word in name for word in WHOLE):
        return "whole"
    if any(word in name for word in ("embed_tokens", "lm_head", "wte", "token_embd", "word_embeddings")) or (
        name == "output.weight"
    ):
        return "embedding"
    return "heads" if re.search(r"\b(k_proj|v_proj|attn_k|attn_v)\b", name) else "split"


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor of this name belongs to."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _from_headers(headers: Mapping[str, Any], held: int, described: Format, tied: bool) -> Iterator[Tensor]:
    """The tensors of files. Floating-point ones are cast to ``held`` bytes as they are loaded; packed ones are not."""
    for name, (dtype, shape) in headers.items():
        if name.endswith("rotary_emb.inv_freq") or (tied and name.startswith("lm_head") and len(headers) > 1):
            continue
        numbers = math.prod(shape)
        size = numbers * DTYPES[dtype]
        kind = tensor_kind(name, len(shape))
        if any(name.endswith(end) or f".{end}" in name for end in SCALES):
            yield Tensor(name, 0, 0, kind if kind != "whole" else _kind_of_scales(name), layer_of(name), size)
        elif dtype in ("F32", "F16", "BF16"):
            yield Tensor(name, numbers, numbers * held, kind, layer_of(name))
        else:
            logical = round(size * 8 / described.bits) if described.bits else numbers
            packed = kind if kind != "whole" else _kind_of_scales(name)
            yield Tensor(name, logical, size, packed, layer_of(name))


def _kind_of_scales(name: str) -> Kind:
    """Flattened, packed numbers have one dimension and are divided as the matrix that they stand for."""
    return tensor_kind(name, 2)


def _from_config(config: Any, held: int, described: Format) -> Iterator[Tensor]:
    for name, shape in _parameters(config):
        numbers, kind = math.prod(shape), tensor_kind(name, len(shape))
        linear = kind in ("split", "heads", "expert") and layer_of(name) is not None
        if linear and described.packs(name):
            yield Tensor(
                name, numbers, math.ceil(numbers * described.bits / 8), kind, layer_of(name), described.scales(numbers)
            )
        else:
            yield Tensor(name, numbers, numbers * held, kind, layer_of(name))


def _parameters(config: Any) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model of ``config``, built without storage."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its own linear layers, which may want a card, are not needed for shapes
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # an encoder
            model = AutoModel.from_config(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
