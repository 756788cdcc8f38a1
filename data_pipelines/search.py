"""``workbench data search "how do I read a parquet file in parallel"``: the passages nearest in meaning, or in words.

    hits = search("how do I read a parquet file in parallel", uri="runs/milvus/documents.db", limit=3)

A Milvus Lite folder that nobody has open is opened directly, without Ray. One that an owner of the running cluster
has open is asked through it.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from data_pipelines.highlight import highlight
from data_pipelines.lite import is_lite_folder
from data_pipelines.store import MilvusUri, is_server, milvus_uri
from workbench.config import Config, environment
from workbench.errors import UserError
from workbench.files import read_record
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    from data_pipelines.encoder import Encoder
    from data_pipelines.owner import ThroughOwner

Mode = Literal["dense", "keywords", "hybrid"]
TARGET_MS = 100.0
"""What a search may take before a Milvus Lite folder counts as too full."""


@dataclass(frozen=True)
class Hit:
    """A passage found: ``score`` is the inner product of unit vectors (1 for the same meaning), BM25's of words, the
    sum of 1 / (60 + rank) in hybrid search, or the reranker's. ``id`` is DOCUMENT#POSITION."""

    id: str
    title: str
    text: str
    source: str
    score: float
    document: str = ""
    position: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


class SearchConfig(Config):
    """What to look for, and where."""

    query: str = Field(min_length=1, description="what to look for, in plain words")
    uri: MilvusUri = Field(default="runs/milvus/documents.db", description="Milvus Lite folder NAME.db, or a server")
    collection: str = Field(default="documents", description="its name")
    limit: int = Field(default=5, ge=1, le=1000, description="how many hits")
    mode: Mode = Field(
        default="dense", description="dense: by meaning; keywords: by words (BM25); hybrid: both, ranks fused"
    )
    where: str = Field(
        default="", description="""a filter, such as 'source like "ray%"' or 'metadata["language"] == "en"'"""
    )
    per_document: bool = Field(default=True, description="only the best passage of a document")
    effort: int = Field(
        default=0, ge=0, description="candidates the index looks at: HNSW's ef (100), IVF's nprobe (16)"
    )
    reranker: str = Field(default="", description="a cross-encoder (name or folder) that orders the best candidates")
    candidates: int = Field(default=50, ge=1, le=1000, description="how many the reranker reads, at least 'limit'")
    model: str = Field(default="", description="where the collection's model lies now; empty: where it lay")


def run(config: SearchConfig, run: Run) -> Summary:
    """Search, and give the hits with the passage of each text that answers best, its words of the query in ``**``.

    Raises UserError if there is no such collection, if it cannot be searched so, or if the folder is held by a process
    that cannot be asked.
    """
    with Searcher(config.uri, config.collection, config.model) as searcher:
        reranker = Reranker(config.reranker) if config.reranker else None
        began = time.perf_counter()
        hits = searcher.search(
            config.query, max(config.limit, config.candidates if reranker else 0), mode=config.mode, where=config.where,
            effort=config.effort, per_document=config.per_document,
        )  # fmt: skip
        if (note := searcher.too_slow(1000 * (time.perf_counter() - began), config.mode)) is not None:
            run.say(note)
    if reranker is not None:
        hits = reranker.order(config.query, hits)[: config.limit]
    rows = [
        {"score": float(f"{hit.score:.6g}"), "title": hit.title, "source": hit.source, "id": hit.id,
         "text": highlight(hit.text, config.query)}
        for hit in hits
    ]  # fmt: skip
    run.report.table(config.query, rows)
    return {"query": config.query, "mode": config.mode, "collection": config.collection, "hits": rows}


def search(query: str, uri: str, collection: str = "documents", limit: int = 5, model: str = "",
           encoder: "Encoder | None" = None, *, mode: Mode = "dense", where: str = "") -> list[Hit]:  # fmt: skip
    """The ``limit`` documents with the passages nearest to ``query``, best first.

    ``encoder`` saves loading the collection's model again, for callers that ask often.
    Raises UserError as ``run`` does.
    """
    with Searcher(uri, collection, model, encoder) as searcher:
        return searcher.search(query, limit, mode=mode, where=where)


class Searcher:
    """A collection and its model, ready for many questions; close it, or use it as a context manager."""

    def __init__(self, uri: str, collection: str = "documents", model: str = "", encoder: Any = None) -> None:
        self._source = open_source(milvus_uri(uri))
        self._uri, self._name, self._model, self._encoder = uri, collection, model, encoder
        try:
            stored = self._source.collection(collection)
            if stored is None:
                names = self._source.collections()
                known = f"it has {', '.join(names)}" if names else "it is empty"
                raise UserError(
                    f"collection: there is no '{collection}' in {uri}; {known}. Make it: workbench data embed"
                )
            self._collection = stored
        except BaseException:
            self.close()
            raise

    def search(
        self,
        query: str,
        limit: int = 5,
        *,
        mode: Mode = "dense",
        where: str = "",
        effort: int = 0,
        per_document: bool = True,
    ) -> list[Hit]:
        """The ``limit`` nearest passages, best first; of each document only the best where ``per_document``.

        Raises UserError for a filter that Milvus does not take, for words sought where none are indexed, and for a
        query that is no text.
        """
        try:
            query.encode()
        except UnicodeEncodeError:
            raise UserError("query: these bytes are no text in UTF-8") from None
        if mode != "dense" and not self._collection.keywords:
            raise UserError(
                f"mode: '{self._name}' in {self._uri} has no index of words; embed it with keywords=true into Milvus "
                f"Lite or a server from 2.5, or search with mode=dense"
            )
        vector = self.encoder.encode([query])[0] if mode != "keywords" else None
        words = query if mode != "dense" else ""
        wanted, hits = limit, []
        while True:
            found = self._source.search(self._name, vector, wanted, words=words, where=where, effort=effort)
            hits = [Hit(**row) for row in found]
            if per_document:
                hits = list({hit.document: hit for hit in reversed(hits)}.values())[::-1]
            if len(hits) >= limit or len(found) < wanted or wanted >= MOST:
                return hits[:limit]
            wanted = min(4 * wanted, MOST)  # several passages of one document were among them

    @property
    def encoder(self) -> "Encoder":
        """The collection's model, loaded when it is first needed. Raises UserError if it is another by now."""
        from data_pipelines.collection import Collection
        from data_pipelines.encoder import Encoder, locate_model, model_revision

        if self._encoder is None:
            stored = self._collection
            folder = locate_model(self._model or stored.model)
            encoder = Encoder(folder)
            wanted = Collection(stored.name, stored.model, model_revision(folder), encoder.dimension)
            stored.check(self._uri, wanted)
            self._encoder = encoder
        return self._encoder

    def too_slow(self, milliseconds: float, mode: Mode) -> str | None:
        """What to say of a search that took so long in a Milvus Lite folder; None if there is nothing to say."""
        if milliseconds < TARGET_MS or is_server(self._uri):
            return None
        vector = self.encoder.encode(["again"])[0] if mode != "keywords" else None
        began = time.perf_counter()
        self._source.search(self._name, vector, 10, words="again" if mode != "dense" else "")
        again = 1000 * (time.perf_counter() - began)
        if again < TARGET_MS:  # the first search also loads
            return None
        return (
            f"a search took {again:.0f} ms over {self._source.count(self._name):,} rows of a Milvus Lite folder, which "
            f"looks through its keys one by one; for less than {TARGET_MS:.0f} ms embed into a Milvus server: "
            f"uri=http://HOST:19530"
        )

    def close(self) -> None:
        """Let the collection go."""
        self._source.close()

    def __enter__(self) -> "Searcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reranker:
    """A cross-encoder, which reads query and passage together (Nogueira, Cho 2019).

    Raises UserError for a model that gives no one score for the two: a head that is not in its files would be made
    up, and order at random.
    """

    def __init__(self, name: str) -> None:
        from sentence_transformers import CrossEncoder

        from data_pipelines.encoder import locate_model

        folder = locate_model(name)
        kinds = (read_record(Path(folder) / "config.json") or {}).get("architectures") or ["a model that does not say"]
        if not any(kind.endswith(SCORING) for kind in kinds):
            raise UserError(
                f"reranker: {name} is no cross-encoder but {', '.join(kinds)}: name one, such as "
                "cross-encoder/ms-marco-MiniLM-L6-v2"
            )
        self._model = CrossEncoder(folder, local_files_only=True)
        if (scores := self._model.num_labels) != 1:
            raise UserError(f"reranker: {name} gives {scores} scores for a query and a passage, not one")

    def order(self, query: str, hits: list[Hit]) -> list[Hit]:
        """``hits`` by the model's score, best first."""
        if not hits:
            return []
        scores = self._model.predict([(query, hit.text) for hit in hits], show_progress_bar=False)
        scored = [Hit(**(asdict(hit) | {"score": float(score)})) for hit, score in zip(hits, scores, strict=True)]
        return sorted(scored, key=lambda hit: -hit.score)


SCORING = ("ForSequenceClassification", "ForCausalLM")
"""Models whose own head scores a text: a classifier's, or a language model's answer yes or no."""
MOST = 1000
"""As many rows as one search asks for at most."""


def open_source(uri: str) -> Any:
    """A ``Store`` on ``uri``, or its owner in the cluster we are connected to or that runs on this machine.

    Raises UserError naming the holder if the folder is held by a process that cannot be asked.
    """
    from data_pipelines.store import Store

    token = environment("MILVUS_TOKEN") or ""
    if is_server(uri):
        return Store(uri, token)
    if not Path(uri).is_dir():
        raise UserError(f"uri: there is no Milvus Lite folder {uri}; make it: workbench data embed uri={uri}")
    import ray

    if ray.is_initialized():
        from data_pipelines.owner import ThroughOwner, find

        if (owner := find(uri)) is not None:
            return ThroughOwner(owner)
    if not is_lite_folder(Path(uri)):
        raise UserError(f"uri: {uri} is no Milvus Lite folder; make one: workbench data embed uri={uri}")
    try:
        return Store(uri)
    except UserError:
        elsewhere = _owner_elsewhere(uri)
        if elsewhere is None:
            raise
        return elsewhere


def _owner_elsewhere(uri: str) -> "ThroughOwner | None":
    """The owner of ``uri`` in a cluster that is up but that we have not joined; joined until it is closed."""
    import ray

    from workbench.session import connect, local_cluster

    if ray.is_initialized() or not (environment("RAY_ADDRESS") or local_cluster()):
        return None
    with ExitStack() as stack:
        stack.enter_context(connect())
        from data_pipelines.owner import ThroughOwner, find

        owner = find(uri)
        return ThroughOwner(owner, stack.pop_all().close) if owner is not None else None
