"""What the training benchmark trains: a random Llama, and Python's own functions as questions and answers.

A question is a function's name, arguments and documentation string, its answer the code. The lengths and the share that
is learned are those of real text, and whoever has the same Python has the same rows.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.conversations import Message
from workbench.errors import UserError
from workloads.chat_templates import TEMPLATES, load_tokenizer
from workloads.conversations import Conversation
from workloads.encoding import Recipe, encode
from workloads.training.batches import Row

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""Padding is token 0, as ``collate`` pads."""


@dataclass(frozen=True)
class Sizes:
    """Of the model. A quarter of the weights that a token meets are in the default head, as in a model of a billion."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1408
    vocabulary: int = 16_384
    heads: int = 8


def functions() -> Iterator[Conversation]:
    """Every function of the standard library that has a documentation string, and the code below it."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)) and len(node.body) > 1:
                code = "\n".join(lines[node.body[0].end_lineno or 0 : node.end_lineno])
                asked = f"Write {node.name}({ast.unparse(node.args)}).\n\n{told}"
                messages = [Message("user", asked), Message("assistant", code)]
                yield Conversation(messages, f"{file.name}:{node.lineno}")


def make(folder: Path, sizes: Sizes, count: int, max_length: int) -> list[Row]:
    """Write the model with its tokenizer to ``folder``/base and ``count`` rows of up to ``max_length`` tokens beside
    it, in a fixed random order. Functions that are longer are left out, not cut. Raises UserError where there are not
    so many."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    conversations = list(functions())
    bpe = ByteLevelBPETokenizer()
    texts = (message.content for conversation in conversations for message in conversation.messages)
    bpe.train_from_iterator(texts, sizes.vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[-1], model_max_length=max_length
    )
    tokenizer.chat_template = TEMPLATES["chatml"].jinja
    base = folder / "base"
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        max_position_embeddings=max_length, pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)

    rows, _ = encode(conversations, load_tokenizer(str(base)), Recipe(str(base), max_length=10 * max_length))
    fitting = [row for row in rows if len(row.ids) <= max_length]
    if len(fitting) < count:
        raise UserError(f"the standard library has {len(fitting)} functions of up to {max_length} tokens, not {count}")
    chosen = random.Random(0).sample(fitting, count)
    (folder / "rows.json").write_text(json.dumps([[row.ids, row.labels] for row in chosen]))
    return chosen


def read(folder: Path) -> list[Row]:
    """The rows that ``make`` wrote."""
    return [Row(ids, labels) for ids, labels in json.loads((folder / "rows.json").read_text())]


def described(rows: Sequence[Row]) -> str:
    """How many, how long, how much of them is learned."""
    lengths = sorted(len(row.ids) for row in rows)
    share = sum(row.targets for row in rows) / sum(lengths)
    return (
        f"{len(rows)} rows of {sum(lengths):,} tokens, {lengths[0]} to {lengths[-1]} each (median "
        f"{lengths[len(lengths) // 2]}), {share:.0%} of them learned"
    )
