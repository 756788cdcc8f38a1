"""The truth that a search benchmark compares with is exact, and what is made is called so."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.bench_vectors import Vectors, exact_scores, gather, recall
from workbench.errors import UserError


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Random vectors of length one."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(rows=st.integers(1, 200), limit=st.integers(1, 20), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_exact_scores_are_the_best_of_all(rows: int, limit: int, seed: int) -> None:
    vectors = Vectors(unit(rows, 8, seed), unit(5, 8, seed + 1), rows)
    limit = min(limit, rows)
    wanted = -np.sort(-(vectors.queries @ vectors.rows.T), axis=1)[:, :limit]
    np.testing.assert_allclose(exact_scores(vectors, limit), wanted, atol=1e-6)


def test_blocks_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors(unit(1000, 8, 1), unit(20, 8, 2), 1000)
    whole = exact_scores(vectors, 10)
    monkeypatch.setattr("data_pipelines.bench_vectors.BLOCK", 7)
    np.testing.assert_allclose(exact_scores(vectors, 10), whole, atol=1e-6)


def test_recall_counts_true_neighbours_and_lets_equal_vectors_stand_for_each_other() -> None:
    rows = np.concatenate([unit(50, 8, 1), unit(50, 8, 1)])  # every vector twice
    vectors = Vectors(rows, unit(4, 8, 2), len(rows))
    exact = exact_scores(vectors, 4)
    order = np.argsort(-(vectors.queries @ rows.T), axis=1)
    assert recall([list(row[:4]) for row in order], vectors, exact) == 1.0
    assert recall([[(place + 50) % 100 for place in row[:4]] for row in order], vectors, exact) == 1.0
    assert recall([list(row[:2]) for row in order], vectors, exact) == 0.5
    assert recall([list(row[-4:]) for row in order], vectors, exact) == 0.0
    assert recall([[]], vectors, exact) == 0.0


def test_queries_are_held_out_and_made_vectors_are_counted(tmp_path: Path) -> None:
    real = unit(300, 16, 3)
    np.save(tmp_path / "a.npy", real[:100])
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(real[100:].ravel()), 16)})
    pq.write_table(table, tmp_path / "b.parquet")
    vectors = gather(tmp_path, rows=500, queries=50, dimension=0, seed=1)
    assert (vectors.real, len(vectors.rows), len(vectors.queries)) == (250, 500, 50)
    assert vectors.origin == "250 real embeddings and 250 made around them, real queries"
    taken = {row.tobytes() for row in np.concatenate([vectors.rows[:250], vectors.queries])}
    assert taken == {row.tobytes() for row in real / np.linalg.norm(real, axis=1, keepdims=True)}
    np.testing.assert_allclose(np.linalg.norm(vectors.rows, axis=1), 1, atol=1e-5)


def test_the_same_seed_makes_the_same_vectors() -> None:
    one, same, other = (gather(None, 400, 20, 32, seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.origin == "400 made vectors, and made queries"


def test_made_vectors_are_clustered() -> None:
    vectors = gather(None, 2000, 50, 64, 1)
    assert exact_scores(vectors, 10)[:, -1].mean() > 0.6, "a query has near neighbours, as a text has"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "neither .npy files nor .parquet files"),
        ({"a.npy": np.zeros(3, np.float32)}, "give an array"),
        ({"a.npy": np.array([["a", "b"]])}, "give an array"),
        (
            {"a.npy": np.array([[1.0, 0.0], [0.0, 0.0], [np.nan, 1.0]])},
            "2 vectors that are all 0 or not finite, the .* 1",
        ),
        ({"a.npy": np.zeros((0, 4), np.float32)}, "has no vectors"),
        ({"a.npy": np.zeros((3, 0), np.float32)}, "0 dimensions"),
        ({"a.npy": unit(3, 4, 1), "b.npy": unit(3, 5, 1)}, "vectors of 5 dimensions, others have 4"),
    ],
)
def test_a_folder_without_vectors_is_refused(tmp_path: Path, files: dict[str, np.ndarray], said: str) -> None:
    for name, array in files.items():
        np.save(tmp_path / name, array)
    with pytest.raises(UserError, match=said):
        gather(tmp_path, 100, 10, 4, 1)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[1.0, 2.0], [1.0]]), "of 2 and of 1 dimensions"),
        (pa.array([[1.0, 2.0], None]), "empty cells"),
        (pa.array([[1.0, None]]), "empty cells"),
        (pa.array([[]], pa.list_(pa.float32())), "0 dimensions"),
        (pa.array(["a"]), "of string: give lists of numbers"),
        (pa.array([["a"]]), "give lists of numbers"),
    ],
)
def test_a_column_without_vectors_is_refused(tmp_path: Path, column: pa.Array, said: str) -> None:
    pq.write_table(pa.table({"vector": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=said):
        gather(tmp_path, 100, 10, 4, 1)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").touch()
    with pytest.raises(UserError, match="cannot be read"):
        gather(tmp_path, 100, 10, 4, 1)
