"""What a collection of document chunks is: its fields, and the model that made its vectors, stored with it.

A row is a chunk: ``id`` is DOCUMENT#POSITION, ``content`` names what it was made from and how, ``chunks`` says how many
its document has, so that from the rows alone anyone can tell which documents are whole and which have changed.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

STORED = "workbench."
ID_BYTES = 512
FIELD_BYTES = 1_024
TEXT_BYTES = 65_535
"""The most that a Milvus VARCHAR holds."""


@dataclass(frozen=True)
class Collection:
    """A collection's ``name``, the ``model`` and its ``revision`` that made the vectors, their ``dimension``, and
    whether texts can also be found by their words (``keywords``, BM25)."""

    name: str
    model: str
    revision: str = ""
    dimension: int = 0
    keywords: bool = False

    def properties(self) -> dict[str, str]:
        """What is stored with it."""
        return {f"{STORED}{key}": str(value) for key, value in asdict(self).items() if key != "name"}

    def check(self, uri: str, wanted: "Collection") -> None:
        """Raise UserError unless the wanted vectors belong here; what ``wanted`` leaves open is not compared."""
        if self.model != wanted.model or (wanted.dimension and self.dimension != wanted.dimension):
            raise UserError(
                f"collection '{self.name}' in {uri} holds vectors of {self.model} ({self.dimension} dimensions), not "
                f"of {wanted.model}: choose another with collection=NAME, or model={self.model}"
            )
        if self.revision and wanted.revision and self.revision != wanted.revision:
            raise UserError(
                f"collection '{self.name}' in {uri} holds vectors of {self.model} as it was in revision "
                f"{self.revision}; here it is {wanted.revision}: choose another with collection=NAME"
            )


def describe(name: str, described: Mapping[str, Any], uri: str) -> Collection:
    """The collection that Milvus describes. Raises UserError if ``data embed`` did not make it."""
    stored = dict(described.get("properties") or {})
    if f"{STORED}model" not in stored:  # servers before 2.4 keep no properties
        with suppress(ValueError):
            stored = dict(json.loads(described.get("description") or "{}"))
    fields = {field["name"] for field in described.get("fields", [])}
    if f"{STORED}model" not in stored or "chunks" not in fields:
        raise UserError(
            f"collection '{name}' in {uri} was not made by this 'data embed', or does not say which model made it: "
            f"name another with collection=NAME"
        )
    return Collection(
        name,
        str(stored[f"{STORED}model"]),
        str(stored.get(f"{STORED}revision", "")),
        int(stored[f"{STORED}dimension"]),
        "keywords" in fields,
    )


def schema(client: Any, collection: Collection) -> Any:
    """The fields, as ``client`` (a pymilvus MilvusClient) takes them."""
    from pymilvus import DataType, Function, FunctionType

    made = client.create_schema(
        auto_id=False, enable_dynamic_field=False, description=json.dumps(collection.properties())
    )
    made.add_field("id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES + 16)
    made.add_field("document", DataType.VARCHAR, max_length=ID_BYTES)
    made.add_field("position", DataType.INT64)
    made.add_field("chunks", DataType.INT64)
    made.add_field("content", DataType.INT64)
    made.add_field("title", DataType.VARCHAR, max_length=FIELD_BYTES)
    made.add_field("source", DataType.VARCHAR, max_length=FIELD_BYTES)
    made.add_field("text", DataType.VARCHAR, max_length=TEXT_BYTES, **_analyzer(collection))
    made.add_field("metadata", DataType.JSON)
    made.add_field("vector", DataType.FLOAT_VECTOR, dim=collection.dimension)
    if collection.keywords:
        made.add_field("keywords", DataType.SPARSE_FLOAT_VECTOR)
        made.add_function(Function("bm25", FunctionType.BM25, input_field_names=["text"],
                                   output_field_names=["keywords"]))  # fmt: skip
    return made


def _analyzer(collection: Collection) -> dict[str, Any]:
    return {"enable_analyzer": True} if collection.keywords else {}


def rows(table: "pa.Table") -> Iterator[dict[str, Any]]:
    """The rows of a table of chunks as Milvus takes them; texts that are too long for a field are cut."""
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    for row, vector in zip(table.drop_columns(["vector"]).to_pylist(), vectors, strict=True):
        yield {
            **row,
            "title": cut(row["title"], FIELD_BYTES),
            "source": cut(row["source"], FIELD_BYTES),
            "text": cut(row["text"], TEXT_BYTES),
            "metadata": json.loads(row["metadata"]),
            "vector": vector,
        }


def cut(text: str, most: int) -> str:
    """The longest start of ``text`` that is at most ``most`` bytes of UTF-8."""
    data = text.encode()
    return text if len(data) <= most else data[:most].decode("utf-8", "ignore")
