"""Which rows of a collection are whole, old or somebody else's, by the rows alone."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.embed import EmbedConfig
from data_pipelines.selection import Wanted, document_of, normal_rows, open_documents, row_id, select
from workbench.errors import UserError

IDS = ["a", "b#1", "c"]


def wanted(**contents: int) -> Wanted:
    return Wanted(contents, 100, [], [])


def test_a_document_counts_when_all_its_chunks_are_there() -> None:
    rows = {"a#0": (1, 2), "a#1": (1, 2), "b#0": (7, 2), "c#0": (8, 1)}
    chosen = wanted(a=1, b=7, c=9)
    assert chosen.missing(rows) == ["b", "c"]
    assert chosen.stale(rows) == ["c#0"]
    assert chosen.others(rows | {"d#0": (1, 1)}) == ["d#0"]


@given(st.dictionaries(st.sampled_from(IDS), st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1), st.data())
def test_killed_anywhere_what_is_missing_and_what_is_old_complete_it(
    documents: dict[str, tuple[int, int]], data: st.DataObject
) -> None:
    """Rows of now and of before, any subset: writing the missing and removing the old leaves exactly the source."""
    now = {row_id(name, at): (content, size) for name, (content, size) in documents.items() for at in range(size)}
    before = {row_id(name, at): (99, size) for name, size in data.draw(
        st.dictionaries(st.sampled_from(IDS), st.integers(1, 5))).items() for at in range(size)}  # fmt: skip
    there = before | {row: now[row] for row in data.draw(st.sets(st.sampled_from(sorted(now))))}
    chosen = wanted(**{name: content for name, (content, _) in documents.items()})
    missing = chosen.missing(there)
    after = there | {row: value for row, value in now.items() if document_of(row) in missing}
    after = {row: value for row, value in after.items() if row not in chosen.stale(after)}
    after = {row: value for row, value in after.items() if row not in chosen.others(after)}
    assert after == now


def dataset(folder: Path, **columns: list[object]) -> ds.Dataset:
    pq.write_table(pa.table(columns), folder / "d.parquet")
    return ds.dataset(str(folder / "d.parquet"))


def test_the_hash_names_text_title_source_metadata_and_recipe(tmp_path: Path) -> None:
    def one(recipe: str = "chunk", **changed: object) -> int:
        row = {"id": 1, "text": "t", "title": "n", "source": "s", "words": 3} | changed
        [content] = select(
            dataset(tmp_path, **{name: [value] for name, value in row.items()}), recipe, metadata=["words"]
        ).contents.values()
        return content

    plain = one()
    assert plain == one()
    changes = [one(text="u"), one(title="m"), one(source="r"), one(words=4), one(recipe="cut")]
    assert len({plain, *changes}) == 6


def test_what_is_chosen(tmp_path: Path) -> None:
    table = dataset(
        tmp_path, id=["c", "a", "b", "d"], text=["x y", "x y z", "x", "x y"], source=["s1", "s1", "s2", "s2"],
        keep=[True, True, True, False],
    )  # fmt: skip
    assert list(select(table, "").contents) == ["a", "b", "c"]
    assert list(select(table, "", limit=2).contents) == ["a", "b"]
    assert list(select(table, "", min_words=2).contents) == ["a", "c"]
    assert list(select(table, "", sources=["s2"]).contents) == ["b"]
    with pytest.raises(UserError, match="nothing with a text is left"):
        select(table, "", sources=["s3"])


def test_ids_that_cannot_be_kept_apart_or_stored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names two documents"):
        select(dataset(tmp_path, id=["a", "a"], text=["1", "2"]), "")
    with pytest.raises(UserError, match="a document has no id"):
        select(dataset(tmp_path, id=["a", None], text=["1", "2"]), "")
    assert len(select(dataset(tmp_path, id=["a", "a"], text=["1", "1"]), "").contents) == 1
    with pytest.raises(UserError, match="more than 512 bytes"):
        select(dataset(tmp_path, id=["a" * 513], text=["1"]), "")


def test_broken_text_is_refused(tmp_path: Path) -> None:
    broken = pa.array([b"one", b"br\xffken"], pa.binary()).view(pa.string())
    for columns in ({"text": broken}, {"text": ["one", "two"], "title": broken}):
        with pytest.raises(UserError, match="text that is not UTF-8; let 'data audit' read them"):
            select(dataset(tmp_path, id=["a", "b"], **columns), "")


def test_columns_of_other_types(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the column 'text' of .* holds int64, not text"):
        open_documents(Path(dataset(tmp_path, id=["a"], text=[1]).files[0]), ["id", "text"])
    table = dataset(tmp_path, id=["a", "b"], text=["one two", "one"], words=["2", "1"], source=[1, 2])
    assert list(select(table, "", min_words=2).contents) == ["a"]
    assert select(dataset(tmp_path, id=["a", "b", "c"], text=["one", None, " "]), "").empty == 2
    far = pa.array([2**60], pa.int64()).view(pa.timestamp("us"))
    batch = pa.table({"id": ["a"], "text": ["x"], "when": far})
    assert "when" in normal_rows(batch, ["when"])["metadata"][0]
    assert list(select(dataset(tmp_path, id=["a"], text=["x"], when=far), "", metadata=["when"]).contents) == ["a"]


@pytest.mark.parametrize(
    ("names", "message"), [(["title"], "'title' is stored in a column of its own"), (["a", "a"], "'a' is named twice")]
)
def test_metadata_names_further_columns(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        EmbedConfig(documents=tmp_path, metadata=names)
