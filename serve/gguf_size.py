"""The size of a model in one GGUF file, from its tensor table; llama.cpp's ``gguf`` package reads it."""

import math
from pathlib import Path

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

    def field(key: str) -> int:
        return max(by_layer(key))

    def by_layer(key: str) -> list[int]:
        """One number, or one for each layer; 0 where there is none."""
        found = reader.fields.get(f"{name}.{key}")
        given = found.contents() if found else 0
        try:
            return [int(each) for each in (given if isinstance(given, list) else [given])] or [0]
        except (TypeError, ValueError):
            raise UserError(f"the size of '{file}' is not known here: {name}.{key} is {given!r}, no number") from None

    tensors = tuple(
        Tensor(t.name, math.prod(int(n) for n in t.shape), int(t.n_bytes), tensor_kind(t.name, len(t.shape)),
               layer_of(t.name))
        for t in reader.tensors
    )  # fmt: skip
    heads, hidden, layers = field("attention.head_count"), field("embedding_length"), field("block_count")
    own = hidden // max(1, heads)
    width = (field("attention.key_length") or own) + (field("attention.value_length") or own)
    cached = by_layer("attention.head_count_kv") if field("attention.head_count_kv") else [heads]
    if len(cached) == 1:
        cached *= layers
    if len(cached) != layers:
        raise UserError(f"{file} has {layers} layers and key-value heads for {len(cached)}")
    names = {tensor.name for tensor in tensors}
    return ModelSize(
        source=str(file),
        tensors=tensors,
        attention=tuple(Attention(count, width) if count else None for count in cached),
        vocabulary=next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), 0),
        hidden=hidden,
        intermediate=field("feed_forward_length"),
        heads=heads,
        context=field("context_length"),
        dtype="float16",
        experts=field("expert_count"),
        chosen=field("expert_used_count"),
        tied="output.weight" not in names,
        format="gguf",
    )
