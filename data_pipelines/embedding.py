"""Ray Data workers that turn documents into chunks with vectors, and the choice of the number type that is fastest."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import ray

from data_pipelines.chunks import chunk_spans, storable
from data_pipelines.collection import TEXT_BYTES
from data_pipelines.encoder import DType, Encoder
from data_pipelines.selection import contents, normal_rows, row_id
from profiling import mark

if TYPE_CHECKING:
    from data_pipelines.sink import MilvusDatasink

LEAST_COSINE = 0.999
"""What bfloat16 vectors must have with those of float32, text by text, to be taken for them."""
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class Recipe:
    """How texts become rows: at most ``max_tokens`` (0: the model's limit) a chunk; what is longer is cut there, or
    becomes several chunks that overlap by up to ``overlap`` tokens; and which columns go along as ``metadata``."""

    max_tokens: int = 0
    overlap: int = 32
    long_texts: Literal["chunk", "cut"] = "chunk"
    metadata: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.long_texts} {self.max_tokens} {self.overlap if self.long_texts == 'chunk' else 0}"


@dataclass(frozen=True)
class ModelPlace:
    """A model's folder, and where and how a worker computes with it."""

    folder: str
    dtype: DType
    device: str
    threads: int
    batch_size: int | None


class Embedder:
    """From a batch of documents to the rows of ``sink.COLUMNS``. ``progress`` is told of texts cut short."""

    def __init__(self, place: ModelPlace, recipe: Recipe, progress: Any) -> None:
        self._recipe, self._progress, self._batch_size = recipe, progress, place.batch_size
        self._encoder = Encoder(
            place.folder,
            dtype=place.dtype,
            max_tokens=recipe.max_tokens,
            threads=place.threads,
            device=place.device,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        documents = normal_rows(batch, self._recipe.metadata)
        numbers = contents(batch, self._recipe.metadata, str(self._recipe))
        spans = self._spans(documents["text"])
        owners = [place for place, found in enumerate(spans) for _ in found]
        positions = [position for found in spans for position in range(len(found))]
        texts = [documents["text"][place][start:end] for place, found in enumerate(spans) for start, end in found]
        vectors = self._encoder.encode(texts, self._batch_size)
        columns: dict[str, Any] = {
            "id": [row_id(documents["id"][place], at) for place, at in zip(owners, positions, strict=True)],
            "document": [documents["id"][place] for place in owners],
            "position": positions,
            "chunks": [len(spans[place]) for place in owners],
            "content": [numbers[place] for place in owners],
            "title": [documents["title"][place] for place in owners],
            "source": [documents["source"][place] for place in owners],
            "text": texts,
            "metadata": [documents["metadata"][place] for place in owners],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
        return pa.table(columns)

    def _spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The chunks of each text; a token has at least one character, so that most texts need no counting."""
        size = self._encoder.text_tokens
        found = [[(0, len(text))] for text in texts]
        long = [place for place, text in enumerate(texts) if len(text) > size]
        offsets = self._encoder.token_offsets([texts[place] for place in long])
        cut = 0
        for place, tokens in zip(long, offsets, strict=True):
            if self._recipe.long_texts == "chunk":
                spans = chunk_spans(texts[place], tokens, size, min(self._recipe.overlap, size - 1))
                found[place] = storable(texts[place], spans, TEXT_BYTES)
            else:
                cut += len(tokens) > size or len(texts[place].encode()) > TEXT_BYTES
        if cut:
            self._progress.add.remote(cut=cut)
        return found


class EmbedIntoMilvus(Embedder):
    """A worker that hands its rows to ``sink``: ``step`` documents are written while the next are embedded, and a batch
    is done when Milvus has all of it."""

    def __init__(self, sink: "MilvusDatasink", step: int, **options: Any) -> None:
        super().__init__(**options)
        self._sink, self._step = sink, step
        self._writer = ThreadPoolExecutor(1, "milvus")

    def __call__(self, batch: pa.Table) -> pa.Table:
        writes = []
        for start in range(0, batch.num_rows, self._step):
            rows = super().__call__(batch.slice(start, self._step))
            writes.append(self._writer.submit(self._sink.write, [rows], None))
        written = pa.table({"rows": [write.result() for write in writes]})
        mark("batch", documents=batch.num_rows)
        return written


@dataclass(frozen=True)
class DTypeChoice:
    """What was measured on a sample: seconds by number type, and the least cosine of a text's two vectors."""

    seconds: dict[str, float]
    cosine: float

    @property
    def dtype(self) -> DType:
        """bfloat16 where it is faster by a tenth and means the same, else float32."""
        faster = self.seconds["float32"] > LEAST_GAIN * self.seconds["bfloat16"]
        return "bfloat16" if faster and self.cosine >= LEAST_COSINE else "float32"

    def __str__(self) -> str:
        ratio = self.seconds["bfloat16"] / self.seconds["float32"]
        return f"{self.dtype}: bfloat16 takes {ratio:.2f} times as long as float32 here, least cosine {self.cosine:.5f}"


@ray.remote
def compare_dtypes(place: ModelPlace, texts: list[str], max_tokens: int) -> DTypeChoice:
    """Encode ``texts`` both ways where a worker would."""
    seconds: dict[str, float] = {}
    vectors: dict[str, np.ndarray] = {}
    names: tuple[DType, DType] = ("float32", "bfloat16")
    for name in names:
        encoder = Encoder(place.folder, dtype=name, max_tokens=max_tokens, threads=place.threads, device=place.device)
        encoder.encode(texts[:4])
        began = time.perf_counter()
        vectors[name] = encoder.encode(texts, place.batch_size)
        seconds[name] = time.perf_counter() - began
    cosines = (vectors["float32"] * vectors["bfloat16"]).sum(axis=1)
    return DTypeChoice(seconds, float(cosines.min()))
