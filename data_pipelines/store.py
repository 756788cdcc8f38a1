"""A Milvus collection of document chunks: the same code for a Milvus Lite folder and for a server."""

import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from data_pipelines.collection import Collection, describe, rows, schema
from data_pipelines.lite import LiteFolder
from data_pipelines.vector_index import KEYWORDS_INDEX, Index, covers, search_params
from workbench.config import resolve_path
from workbench.errors import Failure, UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PAGE = 16_000
"""Milvus returns at most 16,384 rows at once."""
WRITE_BYTES = 8 << 20
"""What one call writes at most; a server takes no message above 64 MiB."""
INDEX_SECONDS = 3_600
CALL_SECONDS = 60
CONNECT_SECONDS = 20
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
HIT_FIELDS = ["document", "position", "title", "source", "text", "metadata"]


ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def literal(text: str) -> str:
    """``text`` as a string of Milvus' filter language; pymilvus does not escape the ids that it is given."""
    return f'"{text.translate(ESCAPED)}"'


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

    Raises UserError when a Lite folder is still held by another process, or no server answers, after ``wait`` seconds.
    What a server does not do, searches excepted, is tried again for ``patience`` seconds; then Failure is raised.
    """

    def __init__(self, uri: str, token: str = "", wait: float = 0, patience: float = 0) -> None:
        self.uri = uri
        self._patience = patience
        self._lite = None if is_server(uri) else LiteFolder(Path(uri), wait)
        self._made: set[str] = set()
        self._loaded: set[str] = set()
        self._client = self._connect(self._lite.address if self._lite else uri, token, wait)

    def _connect(self, address: str, token: str, wait: float) -> Any:
        from pymilvus import MilvusClient, MilvusException

        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # its errors come as exceptions
        deadline = time.monotonic() + wait
        while True:
            try:
                return MilvusClient(uri=address, token=token, timeout=CONNECT_SECONDS)
            except MilvusException as error:
                if time.monotonic() > deadline:
                    raise UserError(f"uri: no Milvus server answers at {self.uri}: {error.message}") from None
            time.sleep(FIRST_PAUSE)

    def close(self) -> None:
        """Flush what was written and let the folder go; safe to call twice."""
        with contextlib.suppress(Exception):
            self._client.close()
        if self._lite is not None:
            lite, self._lite = self._lite, None
            lite.close()

    def has_keywords(self) -> bool:
        """Whether this Milvus finds texts by their words: Milvus Lite, and servers from 2.5."""
        return self._is_lite or tuple(map(int, self._version.removeprefix("v").split("-")[0].split(".")[:2])) >= (2, 5)

    @functools.cached_property
    def _version(self) -> str:
        return str(self._patiently(self._client.get_server_version))

    @property
    def _is_lite(self) -> bool:
        """Whether it is Milvus Lite, also where another process has the folder open and we its address."""
        return self._version.startswith("milvus_lite")

    def collection(self, name: str) -> Collection | None:
        """What the collection ``name`` is, or None if there is none.

        Raises UserError if it was not made by ``data embed``.
        """
        described = self._patiently(
            lambda: self._client.describe_collection(name) if self._client.has_collection(name) else None
        )
        return None if described is None else describe(name, described, self.uri)

    def collections(self) -> list[str]:
        """The names of all collections."""
        return sorted(self._client.list_collections())

    def create(self, collection: Collection) -> None:
        """Make ``collection`` if need be. Raises UserError if it holds another model's vectors."""
        from pymilvus import MilvusException

        if collection.name in self._made:
            return
        if (present := self.collection(collection.name)) is None:
            try:
                self._client.create_collection(
                    collection.name, schema=schema(self._client, collection), properties=collection.properties()
                )
            except MilvusException:  # another writer was first
                if (present := self.collection(collection.name)) is None:
                    raise
        if present is not None:
            present.check(self.uri, collection)
        self._made.add(collection.name)

    def upsert(self, collection: Collection, table: "pa.Table") -> int:
        """Write rows into a collection, made if there is none; returns when Milvus has logged them.

        ``table`` has the collection's columns, ``metadata`` as JSON and ``vector`` as a fixed-size list of float32.
        Raises Failure if Milvus takes no write for ``patience`` seconds, or refuses these rows.
        """
        self._patiently(lambda: self.create(collection))
        written = 0
        step = max(1, WRITE_BYTES // max(1, table.nbytes // max(1, table.num_rows)))
        for start in range(0, table.num_rows, step):
            data = list(rows(table.slice(start, step)))
            done = self._patiently(lambda data=data: self._client.upsert(collection.name, data, timeout=CALL_SECONDS))
            written += int(done["upsert_count"])
        return written

    def _patiently(self, call: Any) -> Any:
        """Make a call that may be made twice, again and again while Milvus cannot be reached or is not ready."""
        from pymilvus import MilvusException
        from pymilvus.exceptions import DataNotMatchException, ParamError

        deadline, pause = time.monotonic() + self._patience, FIRST_PAUSE
        while True:
            try:
                return call()
            except (DataNotMatchException, ParamError) as error:
                raise Failure(f"Milvus at {self.uri} refuses this: {error.message}") from None
            except MilvusException as error:
                if time.monotonic() + pause > deadline:
                    raise Failure(
                        f"Milvus at {self.uri} has failed for {self._patience:g} s: {error.message}"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Remove the rows with these ids."""
        for start in range(0, len(ids), PAGE // 16):
            named = f"id in [{', '.join(map(literal, ids[start : start + PAGE // 16]))}]"
            self._patiently(lambda named=named: self._client.delete(collection, filter=named))

    def contents(self, collection: str) -> dict[str, tuple[int, int]] | None:
        """(content hash, chunks of the document) of every row by id, or None if there is no such collection."""
        return self._patiently(lambda: self._contents(collection))

    def _contents(self, collection: str) -> dict[str, tuple[int, int]] | None:
        if not self._client.has_collection(collection):
            return None
        self._load(collection)
        found: dict[str, tuple[int, int]] = {}
        pages = self._client.query_iterator(
            collection, batch_size=PAGE, output_fields=["id", "content", "chunks"], consistency_level="Strong"
        )
        try:
            while page := pages.next():
                found.update((row["id"], (row["content"], row["chunks"])) for row in page)
        finally:
            pages.close()
        return found

    def build_index(self, collection: str, index: Index) -> None:
        """Build ``index`` over all rows and wait until it covers them; one with other settings is replaced.

        Raises Failure if it is not there after an hour.
        """
        self._patiently(lambda: self._build_index(collection, index))

    def _build_index(self, collection: str, index: Index) -> None:
        self._client.flush(collection)
        present = self._index(collection)
        if present and not index.matches(present):
            self._client.release_collection(collection)
            self._client.drop_index(collection, "vector")
            present = None
        refused: Exception | None = None
        if not present:
            refused = self._create_index(collection, index)
        deadline = time.monotonic() + INDEX_SECONDS
        while not covers(present := self._index(collection)):
            if refused and not present:
                raise Failure(f"Milvus did not build the index of '{collection}': {refused}")
            if time.monotonic() > deadline:
                raise Failure(f"the index of '{collection}' is not finished after {INDEX_SECONDS} s: {present}")
            time.sleep(0.5)
        self._client.load_collection(collection)

    def _create_index(self, collection: str, index: Index) -> Exception | None:
        from pymilvus import MilvusException

        params = self._client.prepare_index_params()
        settings: dict[str, Any] = {**index.params()}
        if self._is_lite:  # which reads them only so
            settings["params"] = index.params()
        params.add_index("vector", index_type=index.kind, metric_type=index.metric, params=settings)
        made = self.collection(collection)
        if made is not None and made.keywords and "keywords" not in self._client.list_indexes(collection):
            params.add_index("keywords", **KEYWORDS_INDEX)
        try:
            self._client.create_index(collection, params)
        except MilvusException as error:
            # A long build outlives the call's deadline; the retry inside then meets the index that the first made.
            return error
        return None

    def search(
        self,
        collection: str,
        vector: "np.ndarray | None",
        limit: int,
        *,
        words: str = "",
        where: str = "",
        effort: int = 0,
    ) -> list[dict[str, Any]]:
        """The ``limit`` best rows: ``id, document, position, title, source, text, metadata, score``.

        By nearness to ``vector`` [dimension], by BM25 of ``words``, or by the fused ranks of both (reciprocal rank
        fusion: Cormack, Clarke, Büttcher 2009). ``where`` is a filter in Milvus' words, ``effort`` that of
        ``search_params``. Raises UserError for a filter that Milvus does not take.
        """
        from pymilvus import AnnSearchRequest, MilvusException, RRFRanker

        self._load(collection)
        near = None if vector is None else ("vector", [vector.tolist()], search_params(limit, effort))
        same: tuple[str, list[Any], dict[str, Any]] | None = ("keywords", [words], {}) if words else None
        try:
            if near and same:
                asked = [AnnSearchRequest(data, name, params, limit, expr=where or None)
                         for name, data, params in (near, same)]  # fmt: skip
                found = self._client.hybrid_search(
                    collection, asked, RRFRanker(), limit=limit, output_fields=HIT_FIELDS
                )
            else:
                name, data, params = near or same or ("vector", [], {})
                found = self._client.search(
                    collection, data, anns_field=name, filter=where, limit=limit, output_fields=HIT_FIELDS,
                    search_params=params,
                )  # fmt: skip
        except MilvusException as error:
            if not where:
                raise Failure(f"Milvus at {self.uri} did not search '{collection}': {error.message}") from None
            raise UserError(f"where: Milvus does not take the filter {where!r}: {error.message}") from None
        sign = -1 if same and not near and self._is_lite else 1  # Milvus Lite gives BM25 as a distance
        return [{"id": hit["id"], "score": sign * float(hit["distance"]), **hit["entity"]} for hit in found[0]]

    def count(self, collection: str) -> int:
        """How many rows there are."""
        [counted] = self._client.query(collection, output_fields=["count(*)"])
        return int(counted["count(*)"])

    def _load(self, collection: str) -> None:
        if collection in self._loaded:
            return
        # A server loads only what is indexed, which a run that was killed early had not come to.
        if not self._index(collection):
            self._create_index(collection, Index())
        self._client.load_collection(collection)
        self._loaded.add(collection)

    def _index(self, collection: str) -> dict[str, Any] | None:
        if "vector" not in self._client.list_indexes(collection):
            return None
        described: dict[str, Any] | None = self._client.describe_index(collection, "vector")
        return described
