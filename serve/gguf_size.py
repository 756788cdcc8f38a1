"""The size of a model in one GGUF file, from its tensor table; llama.cpp's ``gguf`` package reads it."""

import math
from pathlib import Path
from typing import Any

from serve.model_size import Attention, ModelSize, Tensor, layer_of, tensor_kind
from workbench.errors import UserError


def read_gguf(file: Path) -> ModelSize:
    """The size of the model in ``file``. Raises UserError for what is no GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        name = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file} is no GGUF file: {error}") from None

    def field(key: str, default: Any = 0) -> Any:
        found = reader.fields.get(f"{name}.{key}")
        return found.contents() if found else default

    tensors = tuple(
        Tensor(t.name, math.prod(int(n) for n in t.shape), int(t.n_bytes), tensor_kind(t.name, len(t.shape)),
               layer_of(t.name))
        for t in reader.tensors
    )  # fmt: skip
    heads, hidden = int(field("attention.head_count")), int(field("embedding_length"))
    own = hidden // heads
    width = int(field("attention.key_length") or own) + int(field("attention.value_length") or own)
    cached = Attention(int(field("attention.head_count_kv") or heads), width)
    names = {tensor.name for tensor in tensors}
    return ModelSize(
        source=str(file),
        tensors=tensors,
        attention=(cached,) * int(field("block_count")),
        vocabulary=next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), 0),
        hidden=hidden,
        intermediate=int(field("feed_forward_length")),
        heads=heads,
        context=int(field("context_length")),
        dtype="float16",
        experts=int(field("expert_count")),
        chosen=int(field("expert_used_count")),
        tied="output.weight" not in names,
        format="gguf",
    )
