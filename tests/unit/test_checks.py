"""What a command refuses by a look at the disk, before it has a run folder or a Ray session."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import embed
from data_pipelines.store import check_place
from serve import loadtest
from workbench.config import load
from workbench.errors import UserError
from workloads import pretrain
from workloads.sources import check_model


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["One document."]}), file)
    return file


@pytest.mark.parametrize("place", ["/proc/x/y.db", "{folder}/documents.parquet/y.db", "{folder}/file.db"])
def test_an_impossible_place_for_a_collection_is_refused(place: str, documents: Path) -> None:
    (documents.parent / "file.db").touch()
    before = sorted(documents.parent.iterdir())
    uri = place.format(folder=documents.parent)
    config = load(embed.EmbedConfig, None, [f"documents={documents}", f"uri={uri}"])
    with pytest.raises(UserError, match=f"uri: the folder {uri} cannot be made"):
        embed.check(config)
    assert sorted(documents.parent.iterdir()) == before


def test_a_possible_place_is_not_made_by_looking(tmp_path: Path) -> None:
    check_place(str(tmp_path / "new" / "m.db"))
    check_place("http://127.0.0.1:19530")
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_no_text_are_refused(documents: Path) -> None:
    for prompts, reason in ((documents, "is not text"), (documents.parent, "cannot be read")):
        with pytest.raises(UserError, match=f"prompts: .* {reason}"):
            loadtest.check(load(loadtest.LoadTestConfig, None, [f"prompts={prompts}"]))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"id": ["a"]}, "has no column 'text', only id"), ({"text": [1]}, "holds int64, not text")],
)
def test_documents_without_text_are_refused(columns: dict[str, list[object]], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(UserError, match=reason):
        pretrain.check(load(pretrain.PretrainConfig, None, [f"documents={file}"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.head_size=0"], "head_size: Input should be greater than or equal to 2"),
        (["model.head_size=3"], "multiple of 2"),
        (["max_length=4096", "model.context=64"], "give max_length=64, or model.context=4096"),
        (["strategy=single", "workers=1", "dtype=bfloat16"], "give dtype=float32, or strategy=fsdp2"),
        (["strategy=single", "workers=1", "gpus_per_worker=1"], "give dtype=float32, or strategy=fsdp2"),
    ],
)
def test_a_new_model_that_cannot_be_trained_so_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(pretrain.PretrainConfig, None, keys)


def test_documents_that_are_cut_are_counted(tmp_path: Path) -> None:
    from workloads.pretraining import DOCUMENT_CHARACTERS, choose_documents

    file = tmp_path / "some.parquet"
    pq.write_table(pa.table({"text": ["a" * DOCUMENT_CHARACTERS, "b" * 5000, "c"]}), file)
    config = load(pretrain.PretrainConfig, None, [f"documents={file}", "document_share=0.5"])
    texts, cut = choose_documents(config, 10_000)
    assert sorted(map(len, texts)) == [1, 1000, 1000] and cut == 1
    assert choose_documents(config, 0) == ([], 0)


def test_documents_that_are_no_parquet_are_refused(documents: Path, tmp_path: Path) -> None:
    pretrain.check(load(pretrain.PretrainConfig, None, [f"documents={documents}"]))
    file = tmp_path / "bad.parquet"
    file.write_text("no table")
    with pytest.raises(UserError, match="is not Parquet"):
        pretrain.check(load(pretrain.PretrainConfig, None, [f"documents={file}"]))


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    with pytest.raises(UserError, match="base: 'nosuch/model' is not a folder and the hub did not give it"):
        check_model("base", "nosuch/model")
    assert not caplog.records
