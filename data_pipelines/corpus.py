"""The documents of one audit while they are gathered, compared and written.

Rows arrive in any order and are spooled to 16 shards by the first digit of their id; at the end each shard is sorted
by id and written once, with what was found out about duplicates. Memory: one shard of text, and 300 bytes a document.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.duplicates import BANDS, shares_bucket, shingles, survivors, words_of
from data_pipelines.pii import KINDS, find

SHARDS = "0123456789abcdef"
PII_EXAMPLES = 5
LARGEST = 10
REPEATED = "the same row twice"


class Corpus:
    """Gather with ``add``, then ``find_duplicates``, then ``write``; the counts are there afterwards."""

    def __init__(self, documents: Path, quarantine: Path) -> None:
        self._folder = documents
        self._quarantine = quarantine
        self._partial = documents.with_name(".documents.partial")
        self._spool = documents.with_name(".documents.spool")
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._ids: list[np.ndarray] = []
        self._hashes: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._characters: list[np.ndarray] = []
        self._duplicates: dict[str, tuple[str, str, float]] = {}
        self.rows = 0
        self.personal: Counter[str] = Counter()
        self.documents = self.kept = self.exact_duplicates = self.near_duplicates = 0
        self.quarantined: list[dict[str, str]] = []
        self.lengths: list[int] = []
        self.languages: Counter[str] = Counter()
        self.packages: Counter[str] = Counter()
        self.largest: list[dict[str, Any]] = []
        self.examples: list[dict[str, str]] = []
        self.fingerprint = ""

    def __enter__(self) -> Self:
        for folder in (self._partial, self._spool):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._spool, ignore_errors=True)
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, batch: pa.Table) -> None:
        """Take the rows of ``measure.measure``, in any order."""
        reasons = np.asarray(batch["reason"].to_pylist())
        for row in batch.filter(pa.array(reasons != "")).select(["title", "source", "reason"]).to_pylist():
            self.quarantined.append(row)
        good = batch.filter(pa.array(reasons == ""))
        if not good.num_rows:
            return
        ids = good["id"].to_pylist()
        self._ids.append(np.array(ids, dtype="S32"))
        self._hashes.append(np.array(good["normal_hash"].to_pylist(), dtype="V16"))
        self._bands.append(np.frombuffer(b"".join(good["bands"].to_pylist()), dtype=np.uint64).reshape(-1, BANDS))
        self._characters.append(good["characters"].to_numpy())
        self.rows += good.num_rows
        for kind in KINDS:
            self.personal[kind] += int(np.sum(good[f"{kind}s"].to_numpy()))
        rows = good.drop_columns(["reason", "normal_hash", "bands"])
        digits = np.array([i[0] for i in ids])
        for shard in SHARDS:
            mine = digits == shard
            if mine.any():
                self._writer(shard, rows.schema).write_table(rows.filter(pa.array(mine)))

    def find_duplicates(self, threshold: float) -> None:
        """Decide which documents survive: the longest of each set of equals, the smaller id between equals."""
        for writer in self._writers.values():
            writer.close()
        if not self.rows:
            return
        ids = np.concatenate(self._ids)
        hashes = np.concatenate(self._hashes)
        bands = np.concatenate(self._bands)
        order = np.lexsort((ids, -np.concatenate(self._characters).astype(np.int64)))
        first: dict[bytes, int] = {}
        unique: list[int] = []
        for index in order.tolist():
            equal = first.setdefault(hashes[index].tobytes(), index)
            if equal == index:
                unique.append(index)
            elif ids[equal] != ids[index]:
                self._duplicates[ids[index].decode()] = (ids[equal].decode(), "exact", 1.0)
        compare = np.array(unique)[shares_bucket(bands[unique])]
        texts = self._texts(ids[compare])
        found = survivors(compare.tolist(), bands, lambda i: shingles(words_of(texts[ids[i].decode()])), threshold)
        for index, (near, similarity) in found.items():
            self._duplicates[ids[index].decode()] = (ids[near].decode(), "near", similarity)
        # The survivor of an exact duplicate may itself be a near duplicate: point at the one that is kept.
        for own, (survivor, kind, similarity) in list(self._duplicates.items()):
            if kind == "exact" and survivor in self._duplicates:
                self._duplicates[own] = (self._duplicates[survivor][0], kind, similarity)

    def write(self, phone_region: str) -> None:
        """Write the documents by id, and the quarantine; fills in the counts."""
        digest = hashlib.sha256()
        clusters = Counter(survivor for survivor, _, _ in self._duplicates.values())
        largest = dict(sorted(clusters.items(), key=lambda item: (-item[1], item[0]))[:LARGEST])
        for shard in SHARDS:
            file = self._spool / f"{shard}.parquet"
            if not file.exists():
                continue
            table = self._unrepeated(pq.read_table(file))
            table = self._with_duplicates(table)
            pq.write_table(table, self._partial / f"part-{shard}.parquet", compression="zstd")
            for document_id in table["id"].to_pylist():
                digest.update(document_id.encode())
            self._count(table, largest, phone_region)
        self.largest.sort(key=lambda row: (-row["copies"], row["title"]))
        self.quarantined.sort(key=lambda row: (row["source"], row["title"], row["reason"]))
        self.fingerprint = digest.hexdigest()[:16]
        schema = pa.schema([(name, pa.string()) for name in ("title", "source", "reason")])
        pq.write_table(pa.Table.from_pylist(self.quarantined, schema=schema), self._quarantine)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._partial.rename(self._folder)

    def _writer(self, shard: str, schema: pa.Schema) -> pq.ParquetWriter:
        if shard not in self._writers:
            self._writers[shard] = pq.ParquetWriter(self._spool / f"{shard}.parquet", schema)
        return self._writers[shard]

    def _texts(self, wanted: Iterable[bytes]) -> dict[str, str]:
        names = {name.decode() for name in wanted}
        texts: dict[str, str] = {}
        for file in sorted(self._spool.glob("*.parquet")):
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(columns=["id", "text"]):
                    pairs = zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
                    texts.update((name, text) for name, text in pairs if name in names)
        return texts

    def _unrepeated(self, table: pa.Table) -> pa.Table:
        """Sorted by id; of rows with one id (same text, same source) the first title stays."""
        table = table.sort_by([("id", "ascending"), ("title", "ascending")])
        ids = np.array(table["id"].to_pylist(), dtype="S32")
        repeated = np.concatenate([[False], ids[1:] == ids[:-1]])
        if not repeated.any():
            return table
        for row in table.filter(pa.array(repeated)).select(["title", "source"]).to_pylist():
            self.quarantined.append({**row, "reason": REPEATED})
        return table.filter(pa.array(~repeated))

    def _with_duplicates(self, table: pa.Table) -> pa.Table:
        entries = [self._duplicates.get(document_id, ("", "", 0.0)) for document_id in table["id"].to_pylist()]
        table = table.append_column("keep", pa.array([not survivor for survivor, _, _ in entries]))
        table = table.append_column("duplicate_of", pa.array([survivor for survivor, _, _ in entries]))
        table = table.append_column("duplicate_kind", pa.array([kind for _, kind, _ in entries]))
        return table.append_column("similarity", pa.array([s for _, _, s in entries], pa.float32()))

    def _count(self, table: pa.Table, largest: dict[str, int], phone_region: str) -> None:
        kinds = Counter(table["duplicate_kind"].to_pylist())
        self.documents += table.num_rows
        self.kept += kinds[""]
        self.exact_duplicates += kinds["exact"]
        self.near_duplicates += kinds["near"]
        self.lengths += table["characters"].to_pylist()
        self.languages.update(table["language"].to_pylist())
        self.packages.update(source.split(" ", 1)[0].split(":", 1)[0] for source in table["source"].to_pylist())
        for row in table.filter(pa.array([i in largest for i in table["id"].to_pylist()])).to_pylist():
            self.largest.append(
                {
                    "copies": largest[row["id"]],
                    "title": row["title"],
                    "text": _snippet(row["text"]),
                    "source": row["source"],
                }
            )
        seen = Counter(example["kind"] for example in self.examples)
        any_found = np.zeros(table.num_rows, dtype=bool)
        for kind in KINDS:
            if seen[kind] < PII_EXAMPLES:
                any_found |= table[f"{kind}s"].to_numpy() > 0
        for row in table.filter(pa.array(any_found)).to_pylist():
            for finding in find(row["text"], phone_region):
                if seen[finding.kind] < PII_EXAMPLES:
                    seen[finding.kind] += 1
                    self.examples.append(
                        {
                            "kind": finding.kind,
                            "masked": finding.masked(),
                            "title": row["title"],
                            "source": row["source"],
                        }
                    )


def _snippet(text: str, characters: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
