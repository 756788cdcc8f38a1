"""What a search benchmark searches: real vectors from files, made ones where those end, and the exact answers.

Made vectors stand in for embeddings. They lie around centres (real vectors where there are some), and what parts them
from their centre spans few directions, as in real embeddings: noise in all directions would leave every vector of a
cluster equally far from a query, which no graph index can search and no text looks like.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import UserError

LIKENESS = 0.75
"""The cosine between a made vector and its centre."""
DIRECTIONS = 24
"""How many directions the difference spans, near one centre."""
BLOCK = 65_536


@dataclass(frozen=True)
class Vectors:
    """Unit vectors: ``rows`` [rows, dimension], of which the first ``real`` are embeddings of texts, and ``queries``
    [queries, dimension] from the same source that are not among the rows."""

    rows: np.ndarray
    queries: np.ndarray
    real: int

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the rows."""
        digest = hashlib.blake2b(digest_size=8)
        for start in range(0, len(self.rows), BLOCK):
            digest.update(self.rows[start : start + BLOCK].tobytes())
        return digest.hexdigest()

    @property
    def origin(self) -> str:
        """What the rows and queries are, in words."""
        made = len(self.rows) - self.real
        if not self.real:
            return f"{made:,} made vectors, and made queries"
        return f"{self.real:,} real embeddings" + (f" and {made:,} made around them" if made else "") + ", real queries"


def gather(folder: Path | None, rows: int, queries: int, dimension: int, seed: int) -> Vectors:
    """``rows`` vectors and ``queries`` held out: those of ``folder`` (every .npy, and the column ``vector`` of every
    .parquet), and made ones for what it lacks.

    Raises UserError for a folder without vectors, or with vectors of several lengths.
    """
    rng = np.random.default_rng(seed)
    real = _read(folder, rows + queries) if folder is not None else np.zeros((0, dimension), np.float32)
    if len(real) > queries:
        order = rng.permutation(len(real))
        held_out, kept = real[order[:queries]], real[order[queries:]]
    else:
        held_out, kept = real[:0], real
    lacking = rows - len(kept)
    if lacking <= 0:
        return Vectors(kept[:rows], held_out, rows)
    if len(kept) >= DIRECTIONS:
        centres = kept
    else:
        centres = _unit(rng.standard_normal((max(DIRECTIONS, int(rows**0.5)), dimension), dtype=np.float32))
    made = _around(centres, lacking, rng)
    if not len(held_out):
        held_out = _around(centres, queries, rng)
    return Vectors(np.concatenate([kept, made]), held_out, len(kept))


def _read(folder: Path, most: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    count = 0
    for file in sorted([folder] if folder.is_file() else folder.rglob("*")):
        if file.suffix not in (".npy", ".parquet"):
            continue
        for part in _vectors_of(file):
            if parts and part.shape[1] != parts[0].shape[1]:
                raise UserError(
                    f"vectors: {file} has vectors of {part.shape[1]} dimensions, others have {parts[0].shape[1]}"
                )
            parts.append(_directions(part, file))
            count += len(part)
        if count >= most:
            break
    if not count:
        raise UserError(
            f"vectors: {folder} has no vectors: neither .npy files nor .parquet files with a column 'vector' have any"
        )
    return np.concatenate(parts)[:most]


def _directions(part: np.ndarray, file: Path) -> np.ndarray:
    """``part`` [rows, dimension] at length one. Raises UserError where a row has no direction."""
    if not part.shape[1]:
        raise UserError(f"vectors: {file} has vectors of 0 dimensions")
    vectors = part.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(wrong := np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))):
        raise UserError(f"vectors: {file} has {len(wrong)} vectors that are all 0 or not finite, the first {wrong[0]}")
    directions: np.ndarray = vectors / lengths
    return directions


def _vectors_of(file: Path) -> Iterator[np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".npy":
        try:
            array = np.load(file, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"vectors: {file} cannot be read: {error}") from None
        if array.ndim != 2 or array.dtype.kind not in "fiu":
            raise UserError(
                f"vectors: {file} has {array.ndim} dimensions of {array.dtype}: give an array [rows, dimension] of "
                "numbers"
            )
        yield np.asarray(array)
        return
    try:
        parquet = pq.ParquetFile(file)
        if "vector" not in parquet.schema_arrow.names:
            raise UserError(f"vectors: {file} has no column 'vector'; it has {', '.join(parquet.schema_arrow.names)}")
        for batch in parquet.iter_batches(columns=["vector"]):
            if batch.num_rows:
                yield _rows_of(batch.column(0), file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"vectors: {file} cannot be read: {error}") from None


def _rows_of(column: Any, file: Path) -> np.ndarray:
    """A column of lists of numbers as [rows, dimension]. Raises UserError for anything else."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"vectors: {file} has a column 'vector' of {kind}: give lists of numbers")
    if column.null_count or column.flatten().null_count:
        raise UserError(f"vectors: {file} has empty cells in its column 'vector'")
    if len(lengths := pc.unique(pc.list_value_length(column))) > 1:
        raise UserError(f"vectors: {file} has vectors of {lengths[0]} and of {lengths[1]} dimensions")
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1) if len(flat) else np.zeros((len(column), 0), np.float32)


def _around(centres: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` vectors, each near one of ``centres``; those of one centre differ in few directions."""
    dimension = centres.shape[1]
    spans = rng.standard_normal((32, DIRECTIONS, dimension), dtype=np.float32) / np.float32(dimension**0.5)
    made = np.empty((count, dimension), np.float32)
    apart = np.float32((1 / LIKENESS**2 - 1) ** 0.5)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        chosen = rng.integers(len(centres), size=size)
        noise = np.empty((size, dimension), np.float32)
        for number, span in enumerate(spans):
            mine = chosen % len(spans) == number
            noise[mine] = rng.standard_normal((int(mine.sum()), DIRECTIONS), dtype=np.float32) @ span
        made[start : start + size] = _unit(centres[chosen] + apart * _unit(noise))
    return made


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.where(lengths == 0, 1, lengths)
    return scaled


def exact_scores(vectors: Vectors, limit: int) -> np.ndarray:
    """The inner products of each query with its ``limit`` nearest rows, best first [queries, limit]: every row is
    compared."""
    best = np.full((len(vectors.queries), limit), -np.inf, np.float32)
    for start in range(0, len(vectors.rows), BLOCK):
        scores = vectors.queries @ vectors.rows[start : start + BLOCK].T
        keep = min(limit, scores.shape[1])
        near = np.partition(scores, scores.shape[1] - keep, axis=1)[:, -keep:]
        best = np.partition(np.concatenate([best, near], axis=1), keep, axis=1)[:, -limit:]
    return -np.sort(-best, axis=1)


def recall(found: list[list[int]], vectors: Vectors, exact: np.ndarray) -> float:
    """The share of the true nearest rows among those ``found`` (row numbers, a list for each query from the first on).

    A row counts when its true score reaches that of the last true one, so that equal vectors stand for each other, as
    in ann-benchmarks (Aumüller, Bernhardsson, Faithfull 2020).
    """
    limit = exact.shape[1]
    right = 0
    for number, places in enumerate(found):
        scores = vectors.rows[places] @ vectors.queries[number]
        right += min(limit, int((scores >= exact[number, -1] - 1e-5).sum()))
    return right / (limit * len(found)) if found else 0.0
