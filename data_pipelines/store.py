"""A Milvus collection of documents: the same code for a Milvus Lite folder and for a server.

Milvus Lite lets one process open a folder. ``Store`` is that process's hold on it: it writes ``holder.json`` into the
folder, so that anyone who comes too late is told who has it.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from workbench.config import resolve_path
from workbench.errors import Failure, UserError
from workbench.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np

MODEL, DIMENSION = "workbench.model", "workbench.dimension"
TEXT_BYTES = 65_535  # the most that a Milvus VARCHAR holds
FIELD_BYTES = 1_024
PAGE = 16_000  # Milvus returns at most 16,384 rows at once
INDEX_SECONDS = 3_600


@dataclass(frozen=True)
class Index:
    """An HNSW index: ``m`` links a node, ``ef_construction`` candidates while it is built (Malkov, Yashunin 2016)."""

    m: int = 30
    ef_construction: int = 200
    metric: str = "IP"

    def params(self) -> dict[str, int]:
        """In Milvus' names."""
        return {"M": self.m, "efConstruction": self.ef_construction}


def is_server(uri: str) -> bool:
    """Whether ``uri`` is a Milvus server and not a Milvus Lite folder."""
    return uri.startswith(("http://", "https://"))


def milvus_uri(uri: str) -> str:
    """A server's address as it is, a folder's as an absolute path. Raises ValueError if it is neither."""
    if is_server(uri):
        return uri
    if not uri.endswith(".db") or "://" in uri:
        raise ValueError("give a Milvus Lite folder that ends in .db, or http://HOST:PORT of a server")
    return str(resolve_path(Path(uri)))


MilvusUri = Annotated[str, AfterValidator(milvus_uri)]
"""A config's key for where Milvus is."""


def check_place(uri: str) -> None:
    """Raise UserError where a Milvus Lite folder can be neither made nor written; leaves nothing behind."""
    if is_server(uri):
        return
    folder = Path(uri)
    nearest = folder
    try:
        if folder.is_dir():
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"uri: {folder} cannot be written by this user")
            return
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".workbench-"):
            pass
    except OSError as error:
        raise UserError(f"uri: the folder {folder} cannot be made in {nearest}: {error.strerror}") from None


class Store:
    """An open Milvus. Close it, or a Lite folder stays locked until the process ends.

    Raises UserError when a Lite folder is still held by another process after ``wait`` seconds, or when no server
    answers.
    """

    def __init__(self, uri: str, token: str = "", wait: float = 0) -> None:
        from pymilvus import MilvusClient, MilvusException

        logging.getLogger("pymilvus").setLevel(logging.ERROR)
        self.uri = uri
        self._lite: tuple[Any, Any] | None = None
        if is_server(uri):
            try:
                self._client = MilvusClient(uri=uri, token=token, timeout=20)
            except MilvusException as error:
                raise UserError(f"uri: no Milvus server answers at {uri}: {error.message}") from None
            return
        port = self._open_folder(wait)
        self._client = MilvusClient(uri=f"http://127.0.0.1:{port}")

    def _open_folder(self, wait: float) -> int:
        from milvus_lite.adapter.grpc.server import start_server_in_thread
        from milvus_lite.exceptions import DataDirLockedError

        Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait
        while True:
            try:
                server, database, port = start_server_in_thread(data_dir=self.uri, host="127.0.0.1", port=0)
                break
            except DataDirLockedError:
                if time.monotonic() > deadline:
                    raise UserError(f"uri: {self.uri} is in use: {describe_holder(self.uri)}") from None
                time.sleep(0.2)
        self._lite = (server, database)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process": " ".join(sys.argv)[:200],
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(Path(self.uri) / "holder.json", holder)
        return int(port)

    def close(self) -> None:
        """Flush what was written and let the folder go; safe to call twice."""
        with contextlib.suppress(Exception):
            self._client.close()
        if self._lite is not None:
            server, database = self._lite
            self._lite = None
            (Path(self.uri) / "holder.json").unlink(missing_ok=True)
            server.stop(grace=2)
            database.close()

    def model(self, collection: str) -> tuple[str, int] | None:
        """(model, dimension) that ``collection`` was made with, or None if there is no such collection.

        Raises UserError if the collection was not made by ``data embed``.
        """
        if not self._client.has_collection(collection):
            return None
        described = self._client.describe_collection(collection)
        stored = dict(described.get("properties") or {})
        if MODEL not in stored:
            with contextlib.suppress(ValueError):
                stored = dict(json.loads(described.get("description") or "{}"))
        if MODEL not in stored:
            raise UserError(f"collection '{collection}' in {self.uri} does not say which model made it: name another")
        return str(stored[MODEL]), int(stored[DIMENSION])

    def collections(self) -> list[str]:
        """The names of all collections."""
        return sorted(self._client.list_collections())

    def create(self, collection: str, model: str, dimension: int) -> None:
        """Make ``collection`` if need be. Raises UserError if it holds another model's vectors."""
        from pymilvus import DataType

        present = self.model(collection)
        if present is not None:
            check_model(collection, self.uri, present, (model, dimension))
            return
        stored = {MODEL: model, DIMENSION: str(dimension)}
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False, description=json.dumps(stored))
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("content", DataType.INT64)
        schema.add_field("title", DataType.VARCHAR, max_length=FIELD_BYTES)
        schema.add_field("source", DataType.VARCHAR, max_length=FIELD_BYTES)
        schema.add_field("text", DataType.VARCHAR, max_length=TEXT_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        self._client.create_collection(collection, schema=schema, properties=stored)

    def upsert(self, collection: str, rows: dict[str, list[Any]], vectors: "np.ndarray") -> int:
        """Write rows (columns ``id, content, title, source, text``) and their vectors [rows, dimension]."""
        data = [
            {
                "id": row_id,
                "content": content,
                "title": cut(title, FIELD_BYTES),
                "source": cut(source, FIELD_BYTES),
                "text": cut(text, TEXT_BYTES),
                "vector": vector,
            }
            for row_id, content, title, source, text, vector in zip(
                rows["id"], rows["content"], rows["title"], rows["source"], rows["text"], vectors, strict=True
            )
        ]
        return int(self._client.upsert(collection, data)["upsert_count"])

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Remove the rows with these ids."""
        for start in range(0, len(ids), PAGE // 16):
            self._client.delete(collection, ids=list(ids[start : start + PAGE // 16]))

    def contents(self, collection: str) -> dict[str, int] | None:
        """The content hash of every row by id, or None if there is no such collection."""
        if not self._client.has_collection(collection):
            return None
        self._load(collection)
        rows: dict[str, int] = {}
        pages = self._client.query_iterator(collection, batch_size=PAGE, output_fields=["id", "content"])
        try:
            while page := pages.next():
                rows.update((row["id"], row["content"]) for row in page)
        finally:
            pages.close()
        return rows

    def build_index(self, collection: str, index: Index) -> None:
        """Build ``index`` over all rows and wait until it covers them; one with other settings is replaced.

        Raises Failure if it is not there after an hour.
        """
        self._client.flush(collection)
        present = self._index(collection)
        if present and not _same(present, index):
            self._client.release_collection(collection)
            self._client.drop_index(collection, "vector")
            present = None
        refused: Exception | None = None
        if not present:
            refused = self._create_index(collection, index)
        deadline = time.monotonic() + INDEX_SECONDS
        while not _covers(present := self._index(collection)):
            if refused and not present:
                raise Failure(f"Milvus did not build the index of '{collection}': {refused}")
            if time.monotonic() > deadline:
                raise Failure(f"the index of '{collection}' is not finished after {INDEX_SECONDS} s: {present}")
            time.sleep(0.5)
        self._client.load_collection(collection)

    def _create_index(self, collection: str, index: Index) -> Exception | None:
        from pymilvus import MilvusException

        params = self._client.prepare_index_params()
        params.add_index("vector", index_type="HNSW", metric_type=index.metric, params=index.params())
        try:
            self._client.create_index(collection, params)
        except MilvusException as error:
            # A long build outlives the call's deadline; the retry inside then meets the index that the first made.
            return error
        return None

    def search(self, collection: str, vector: "np.ndarray", limit: int) -> list[dict[str, Any]]:
        """The ``limit`` nearest rows to ``vector`` [dimension]: ``id, title, text, source, score``, best first."""
        self._load(collection)
        found = self._client.search(
            collection,
            [vector.tolist()],
            limit=limit,
            output_fields=["title", "text", "source"],
            search_params={"params": {"ef": max(100, limit)}},
        )
        return [{"id": hit["id"], "score": float(hit["distance"]), **hit["entity"]} for hit in found[0]]

    def _load(self, collection: str) -> None:
        # A server loads only what is indexed, which a run that was killed early had not come to.
        if not self._index(collection):
            self._create_index(collection, Index())
        self._client.load_collection(collection)

    def _index(self, collection: str) -> dict[str, Any] | None:
        if not self._client.list_indexes(collection):
            return None
        described: dict[str, Any] | None = self._client.describe_index(collection, "vector")
        return described


def _same(present: dict[str, Any], index: Index) -> bool:
    wanted = {"index_type": "HNSW", "metric_type": index.metric, **index.params()}
    return all(str(present[key]) == str(value) for key, value in wanted.items() if key in present)


def _covers(present: dict[str, Any] | None) -> bool:
    return present is not None and present.get("state", "Finished") == "Finished" and not present["pending_index_rows"]


def check_model(collection: str, uri: str, present: tuple[str, int], wanted: tuple[str, int]) -> None:
    """Raise UserError unless the collection's (model, dimension) is the wanted one; dimension 0 is not compared."""
    if present[0] != wanted[0] or (wanted[1] and present[1] != wanted[1]):
        raise UserError(
            f"collection '{collection}' in {uri} holds vectors of {present[0]} ({present[1]} dimensions), not of "
            f"{wanted[0]}: choose another with collection=NAME, or model={present[0]}"
        )


def describe_holder(uri: str) -> str:
    """Who has the Lite folder open, in words."""
    try:
        holder = read_json(Path(uri) / "holder.json")
    except (OSError, ValueError):
        return "another process has it open, and has not said who it is"
    return (
        f"process {holder['pid']} on {holder['host']} has had it open since {holder['since']} "
        f"({holder['process']}); wait for it to end, or stop it"
    )


def cut(text: str, most: int) -> str:
    """The longest start of ``text`` that is at most ``most`` bytes of UTF-8."""
    data = text.encode()
    return text if len(data) <= most else data[:most].decode("utf-8", "ignore")
