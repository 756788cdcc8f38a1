"""The index over a collection's vectors: its kinds, their settings, and whether one is whole."""

from dataclasses import dataclass
from typing import Any, Literal

IndexKind = Literal["HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8"]
Metric = Literal["IP", "COSINE", "L2"]

KEYWORDS_INDEX = {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25"}


@dataclass(frozen=True)
class Index:
    """``HNSW`` (Malkov, Yashunin 2016): ``m`` links a node, ``ef_construction`` candidates while it is built.
    ``IVF_*``: ``nlist`` clusters. ``FLAT``: none, exact search."""

    kind: IndexKind = "HNSW"
    metric: Metric = "IP"
    m: int = 30
    ef_construction: int = 200
    nlist: int = 1024

    def params(self) -> dict[str, int]:
        """In Milvus' names."""
        if self.kind == "HNSW":
            return {"M": self.m, "efConstruction": self.ef_construction}
        return {} if self.kind == "FLAT" else {"nlist": self.nlist}

    def matches(self, present: dict[str, Any]) -> bool:
        """Whether an index that Milvus describes has these settings."""
        wanted = {"index_type": self.kind, "metric_type": self.metric, **self.params()}
        told = {**present, **(present.get("params") or {})}
        return all(str(told.get(key)) == str(value) for key, value in wanted.items())


def search_params(limit: int, effort: int = 0) -> dict[str, Any]:
    """``effort``: candidates that HNSW looks at (ef), or clusters that IVF does (nprobe); 0 means 100, or 16."""
    return {"params": {"ef": max(effort or 100, limit), "nprobe": effort or 16}}


def covers(present: dict[str, Any] | None) -> bool:
    """Whether an index that Milvus describes is there and finished for every row."""
    return present is not None and present.get("state", "Finished") == "Finished" and not present["pending_index_rows"]
