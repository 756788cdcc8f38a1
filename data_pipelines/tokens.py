"""The tokenizer that lengths are counted with: a tokenizer.json, the folder of a model, or a model's name."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.encoder import PACKAGED, locate_model
from workbench.config import resolve_path
from workbench.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def locate_tokenizer(name: str) -> str:
    """The path of the tokenizer.json that ``name`` means. Raises UserError if there is none."""
    path = resolve_path(Path(name))
    if name not in PACKAGED and path.is_file():
        return str(path)
    if name not in PACKAGED and (path / "tokenizer.json").is_file():
        return str(path / "tokenizer.json")
    file = Path(locate_model(name)) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"tokenizer: {file.parent} has no tokenizer.json; name a model with a fast tokenizer")
    return str(file)


def token_counts(texts: Sequence[str], path: str) -> list[int]:
    """How many tokens each text has, without special ones."""
    encoded = _tokenizer(path).encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(each.ids) for each in encoded]


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()  # a model's own limit is kept in the file
    tokenizer.no_padding()
    return tokenizer
