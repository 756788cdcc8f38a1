"""``workbench data search "how do I read a parquet file in parallel"``: the documents nearest in meaning.

    hits = search("how do I read a parquet file in parallel", uri="runs/milvus/documents.db", limit=3)

A Milvus Lite folder that nobody has open is opened directly, without Ray. One that an owner of the running cluster
has open is asked through it.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from data_pipelines.store import MilvusUri, is_server, milvus_uri
from workbench.config import Config, environment
from workbench.errors import UserError
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    from data_pipelines.encoder import Encoder

SNIPPET = 200


@dataclass(frozen=True)
class Hit:
    """A document found: ``score`` is the inner product of unit vectors, 1 for the same meaning."""

    id: str
    title: str
    text: str
    source: str
    score: float


class SearchConfig(Config):
    """What to look for, and where."""

    query: str = Field(min_length=1, description="what to look for, in plain words")
    uri: MilvusUri = Field(default="runs/milvus/documents.db", description="Milvus Lite folder NAME.db, or a server")
    collection: str = Field(default="documents", description="its name")
    limit: int = Field(default=5, ge=1, le=1000, description="how many hits")
    model: str = Field(default="", description="where the collection's model lies now; empty: where it lay")


def run(config: SearchConfig, run: Run) -> Summary:
    """Search, and give the hits with a snippet of each text.

    Raises UserError if there is no such collection, or the folder is held by a process that cannot be asked.
    """
    hits = search(config.query, config.uri, config.collection, config.limit, config.model)
    rows = [
        {"score": round(hit.score, 3), "title": hit.title, "source": hit.source, "text": snippet(hit.text)}
        for hit in hits
    ]
    run.report.table(config.query, rows)
    return {"query": config.query, "collection": config.collection, "hits": rows}


def search(query: str, uri: str, collection: str = "documents", limit: int = 5, model: str = "",
           encoder: "Encoder | None" = None) -> list[Hit]:  # fmt: skip
    """The ``limit`` documents nearest to ``query``, best first.

    ``encoder`` saves loading the collection's model again, for callers that ask often.
    Raises UserError as ``run`` does.
    """
    with Searcher(uri, collection, model, encoder) as searcher:
        return searcher.search(query, limit)


class Searcher:
    """A collection and its model, ready for many questions; close it, or use it as a context manager."""

    def __init__(self, uri: str, collection: str = "documents", model: str = "", encoder: Any = None) -> None:
        from data_pipelines.encoder import Encoder, locate_model
        from data_pipelines.store import check_model

        self._collection = collection
        self._source = open_source(milvus_uri(uri))
        try:
            stored = self._source.model(collection)
            if stored is None:
                names = self._source.collections()
                known = f"it has {', '.join(names)}" if names else "it is empty"
                raise UserError(
                    f"collection: there is no '{collection}' in {uri}; {known}. Make it: workbench data embed"
                )
            if model and encoder is None:
                encoder = Encoder(locate_model(model))
                check_model(collection, uri, stored, (stored[0], encoder.dimension))
            self._encoder = encoder or Encoder(locate_model(stored[0]))
        except BaseException:
            self.close()
            raise

    def search(self, query: str, limit: int = 5) -> list[Hit]:
        """The ``limit`` nearest documents, best first."""
        vector = self._encoder.encode([query])[0]
        return [Hit(**row) for row in self._source.search(self._collection, vector, limit)]

    def close(self) -> None:
        """Let the collection go."""
        self._source.close()

    def __enter__(self) -> "Searcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ThroughOwner:
    """``Store``'s reading half, asked of the actor that has the folder open."""

    def __init__(self, owner: Any, connection: ExitStack | None = None) -> None:
        self._owner = owner
        self._connection = connection or ExitStack()

    def __getattr__(self, name: str) -> Any:
        from data_pipelines.owner import ask

        return lambda *arguments: ask(getattr(self._owner, name).remote(*arguments))

    def close(self) -> None:
        """Leave the cluster if it was joined for this; the owner stays as it is."""
        self._connection.close()


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
        from data_pipelines.owner import find

        if (owner := find(uri)) is not None:
            return ThroughOwner(owner)
    try:
        return Store(uri)
    except UserError:
        elsewhere = _owner_elsewhere(uri)
        if elsewhere is None:
            raise
        return elsewhere


def _owner_elsewhere(uri: str) -> ThroughOwner | None:
    """The owner of ``uri`` in a cluster that is up but that we have not joined; joined until it is closed."""
    import ray

    from workbench.session import connect, local_cluster

    if ray.is_initialized() or not (environment("RAY_ADDRESS") or local_cluster()):
        return None
    with ExitStack() as stack:
        stack.enter_context(connect())
        from data_pipelines.owner import find

        owner = find(uri)
        return ThroughOwner(owner, stack.pop_all()) if owner is not None else None


def snippet(text: str, characters: int = SNIPPET) -> str:
    """The start of ``text`` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def as_rows(hits: list[Hit]) -> list[dict[str, Any]]:
    """The hits as plain dicts, fit for JSON."""
    return [asdict(hit) for hit in hits]
