"""A model of the Llama family as one GGUF file, by llama.cpp's own package ``gguf``.

Converted is what can be told to be the same: Llama, Qwen2 and Qwen3 with rotary positions as they are or scaled as
Llama 3's, and byte-level BPE tokenizers that cut text as one of llama.cpp's does. Anything else is refused, for
llama.cpp's ``convert_hf_to_gguf.py``, which takes an export in safetensors. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from pathlib import Path
from typing import Any

from workbench.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Transformers' model types whose name is llama.cpp's, too."""

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CUTS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (LETTERS + r"\p{N}" + SIGNS, "bytes"): "qwen2",
    (LETTERS + r"\p{N}{1,3}" + SIGNS, "bytes"): "llama-bpe",
}
"""How a tokenizer cuts text before it merges bytes, and llama.cpp's name of it: a regular expression, or ``words``
(GPT-2's, built into the byte-level step), ``digits`` (each alone) and ``bytes`` (no further cut)."""

WHOLE_FIRST = ("llama-bpe",)
"""Those where a piece that is a token as a whole is not merged from its bytes."""

INSTEAD = "export with format=safetensors and convert that with llama.cpp's convert_hf_to_gguf.py"


def check_convertible(config: Any, tokenizer: Any) -> None:
    """Raise UserError for a model or tokenizer that is not converted."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"no GGUF is written of a {config.model_type}, but of {', '.join(ARCHITECTURES)}: {INSTEAD}")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "llama3") or (rope == "llama3" and config.model_type != "llama"):
        raise UserError(f"no GGUF is written of a {config.model_type} with {rope} positions: {INSTEAD}")
    if getattr(config, "use_sliding_window", False) or getattr(config, "mlp_bias", False):
        raise UserError(f"no GGUF is written of a model with sliding windows, or biases in its MLP: {INSTEAD}")
    cut_of(tokenizer)


def cut_of(tokenizer: Any) -> str:
    """llama.cpp's name of how ``tokenizer`` cuts text. Raises UserError where it has none."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, step = described["model"], described["pre_tokenizer"] or {}
    steps = tuple(_step(each) for each in step.get("pretokenizers", [step]))
    name = CUTS.get(steps)
    normal = {"qwen2": (None, "NFC")}.get(name or "", (None,))
    if (
        name is None
        or model["type"] != "BPE"
        or model.get("ignore_merges", False) != (name in WHOLE_FIRST)
        or (described["normalizer"] or {}).get("type") not in normal
    ):
        raise UserError(f"the tokenizer cuts text as none of {', '.join(CUTS.values())} does: {INSTEAD}")
    return name


def _step(step: dict[str, Any]) -> str:
    """A step of a pre-tokenizer as a word or regular expression of ``CUTS``, empty for any other."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", ""))
    return ""


def write_gguf(model: Any, tokenizer: Any, file: Path, dtype: str) -> None:
    """Write ``model`` (on the CPU, in ``dtype``) and ``tokenizer``; vectors are kept in float32, as llama.cpp has them.

    Raises UserError as ``check_convertible``.
    """
    check_convertible(model.config, tokenizer)
    import gguf

    writer = gguf.GGUFWriter(file, model.config.model_type)
    writer.add_name(file.stem)
    writer.add_file_type(
        {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}.get(
            dtype, gguf.LlamaFileType.MOSTLY_BF16
        )
    )
    _add_sizes(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    _add_weights(writer, model, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Tokens by their ids, with fillers up to the ``vocabulary`` of the embedding; merges; special tokens; template."""
    from gguf import TokenType

    names = {place: token for token, place in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for place in range(vocabulary):
        tokens.append(added[place].content if place in added else names.get(place, f"[PAD{place}]"))
        kind = TokenType.NORMAL if place in names else TokenType.UNUSED
        if place in added:
            kind = TokenType.CONTROL if added[place].special else TokenType.USER_DEFINED
        kinds.append(kind)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    encoded = tokenizer("a").input_ids
    for name in ("bos", "eos", "pad"):
        if (place := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(place)
    writer.add_add_bos_token(encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(encoded[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_weights(writer: Any, model: Any, dtype: str) -> None:
    import gguf
    import torch

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if config.model_type == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = _pairs_side_by_side(weight, heads)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"no GGUF is written of a model with {name}: {INSTEAD}")
        if weight.ndim == 1 or dtype == "float32":
            writer.add_tensor(theirs, weight.float().numpy())
        elif dtype == "float16":
            writer.add_tensor(theirs, weight.half().numpy())
        else:
            as_bytes = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(theirs, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor(gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", _slowed(config).numpy())


def _pairs_side_by_side(weight: Any, heads: int) -> Any:
    """Rows of each head reordered: Transformers turns coordinate i with i + H / 2, llama.cpp's Llama 2i with 2i + 1."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape).contiguous()


def _slowed(config: Any) -> Any:
    """By how much the scaled positions turn each pair of coordinates slower than the plain ones."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / scaled
