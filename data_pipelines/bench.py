"""``workbench data bench configs/data/bench.yaml``: how fast and how exactly a Milvus finds vectors, index by index.

Vectors (real ones from a folder, made ones beyond them) are written by the same store as those of ``data embed``. Then,
for each index: the time it takes to build, memory and disk, recall against exact search and latency for several
efforts, eight clients at once, and what our search adds to a bare pymilvus call. With judged queries also how good the
answers are. The collection is the benchmark's own and stays, so that the next run need not write the vectors again.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from data_pipelines.bench_quality import JudgedConfig, judge
from data_pipelines.store import MilvusUri, check_place, is_server
from data_pipelines.vector_index import Index, IndexKind, Metric
from workbench.config import Config, InputPath, environment
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    from data_pipelines.bench_search import Target
    from data_pipelines.bench_vectors import Vectors
    from data_pipelines.store import Store

MADE_BY = "workbench data bench"
BATCH = 5_000
WARM_UP = 20
SPEAK_SECONDS = 10.0
FLUSH_SECONDS = 600
PAIRED = 200


class BenchConfig(Config):
    """Which vectors, in which Milvus, under which indexes."""

    uri: MilvusUri = Field(
        default="runs/milvus/bench.db",
        description="Milvus Lite folder NAME.db, or http://HOST:19530 (MILVUS_TOKEN=user:password in the environment)",
    )
    collection: str = Field(
        default="workbench_bench", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", description="the benchmark's own"
    )
    vectors: InputPath | None = Field(
        default=None, description="embeddings: .npy files, .parquet files with a column 'vector', or a folder of them"
    )
    rows: int = Field(default=500_000, ge=0, description="vectors to search; what 'vectors' lacks is made; 0: none")
    dimension: int = Field(default=384, ge=2, le=32_768, description="of made vectors, where no others are given")
    characters: int = Field(default=500, ge=1, le=20_000, description="length of the text that each row carries")
    indexes: list[IndexKind] = Field(default=["FLAT", "IVF_FLAT", "HNSW"], description="built in turn")
    metric: Metric = Field(default="IP", description="distance; vectors have length one")
    m: int = Field(default=30, ge=4, le=64, description="HNSW: links of a node")
    ef_construction: int = Field(default=200, ge=8, le=1024, description="HNSW: candidates while building")
    nlist: int = Field(default=1024, ge=1, le=65_536, description="IVF: clusters")
    ef: list[int] = Field(default=[16, 32, 64, 100, 200, 400], description="HNSW: efforts to search with")
    nprobe: list[int] = Field(default=[1, 4, 16, 64], description="IVF: efforts to search with")
    limit: int = Field(default=10, ge=1, le=1000, description="hits of a search; recall is at this many")
    searches: int = Field(default=1000, ge=20, description="different queries, held out of the vectors")
    seconds: float = Field(default=20, gt=0, description="the most that one measurement takes")
    clients: int = Field(default=8, ge=0, le=256, description="processes that search at once; 0: leave it out")
    target_ms: float = Field(default=100, gt=0, description="what p95 must stay under")
    target_recall: float = Field(default=0.95, gt=0, le=1, description="what recall must reach")
    storage: Path | None = Field(default=None, description="a server's data folder, if it is here, to measure the disk")
    fresh: bool = Field(default=False, description="write the vectors even if they are there")
    seed: int = Field(default=17, description="of the made vectors and the choice of queries")
    judged: JudgedConfig | None = Field(default=None, description="queries and judgements, in BEIR's or TREC's files")

    def index(self, kind: IndexKind) -> Index:
        """The index ``kind`` with these settings."""
        return Index(kind, self.metric, self.m, self.ef_construction, self.nlist)

    def efforts(self, kind: IndexKind) -> list[int]:
        """What to search ``kind`` with; exact search knows one effort."""
        if kind == "FLAT":
            return [0]
        return [max(effort, self.limit) for effort in self.ef] if kind == "HNSW" else self.nprobe


def check(config: BenchConfig) -> None:
    """Raise UserError for a folder that cannot be written, or nothing to do."""
    check_place(config.uri)
    if not config.rows and config.judged is None:
        raise UserError("rows: 0 leaves nothing to measure; give rows, or judged queries")
    if config.rows and config.rows < config.limit:
        raise UserError(f"rows: {config.rows} are fewer than the {config.limit} hits of a search")
    if config.metric == "L2":
        raise UserError("metric: L2 gives distances, where less is better; measure IP, which ranks unit vectors alike")


def run(config: BenchConfig, run: Run) -> Summary:
    """Measure, and draw recall against latency.

    Raises UserError if no Milvus answers or the collection is somebody else's, Failure if an index is not built.
    """
    from data_pipelines.bench_search import open_target
    from data_pipelines.store import Store

    token = environment("MILVUS_TOKEN") or ""
    summary: Summary = {"uri": config.uri, "collection": config.collection}
    with open_target(config.uri, token) as target:
        store = Store(target.address, target.token, patience=60)
        try:
            if config.rows:
                summary |= _measure(config, store, target, run)
            if config.judged is not None:
                summary["judged"] = judge(config.judged, config.collection, store, target, run)
        finally:
            store.close()
    return summary


def _measure(config: BenchConfig, store: "Store", target: "Target", run: Run) -> Summary:
    from data_pipelines import bench_report
    from data_pipelines.bench_vectors import exact_scores, gather

    vectors = gather(config.vectors, config.rows, config.searches, config.dimension, config.seed)
    run.say(f"{vectors.origin}; searching them exactly for the truth")
    exact = exact_scores(vectors, config.limit)
    with target.client() as client:
        version = client.get_server_version()
    run.input("vectors", origin=vectors.origin, fingerprint=vectors.fingerprint, folder=str(config.vectors or ""))
    written = _fill(config, store, target, vectors, run)
    indexes, points = [], []
    for kind in config.indexes:
        measured = _index(config, kind, store, target, vectors, exact, run)
        points += measured.pop("points")
        indexes.append(measured)
    bench_report.draw(run.report, points, indexes, vectors.origin, config.limit, config.target_ms)
    verdict = bench_report.verdict(points, config, lite=not is_server(config.uri))
    run.say(verdict)
    return {
        "vectors": vectors.origin,
        "dimension": vectors.rows.shape[1],
        "milvus": version,
        **written,
        "verdict": verdict,
        "indexes": indexes,
        "points": points,
    }


def _fill(config: BenchConfig, store: "Store", target: "Target", vectors: "Vectors", run: Run) -> dict[str, Any]:
    """Write the vectors unless they are there; seconds and rows a second, None where they were."""
    from data_pipelines.bench_rows import filler, made_table
    from data_pipelines.collection import Collection

    wanted = Collection(config.collection, MADE_BY, vectors.fingerprint, vectors.rows.shape[1])
    with target.client() as client:
        if client.has_collection(config.collection):
            present = store.collection(config.collection)
            if present is None or present.model != MADE_BY:
                raise UserError(
                    f"collection: '{config.collection}' in {config.uri} is not this benchmark's: name another"
                )
            if present == wanted and _rows(client, config.collection) == len(vectors.rows) and not config.fresh:
                run.say(f"the {len(vectors.rows):,} vectors are in '{config.collection}' already")
                return {"write_seconds": None, "rows_per_second": None}
            client.drop_collection(config.collection)
        text = filler(config.characters)
        began, spoken = time.perf_counter(), time.perf_counter()
        for start in range(0, len(vectors.rows), BATCH):
            block = vectors.rows[start : start + BATCH]
            names = [str(number) for number in range(start, start + len(block))]
            store.upsert(wanted, made_table(names, block, [text] * len(block)))
            if time.perf_counter() - spoken > SPEAK_SECONDS:
                spoken = time.perf_counter()
                run.say(f"{start + len(block):,} of {len(vectors.rows):,} written")
        client.flush(config.collection, timeout=FLUSH_SECONDS)
        seconds = time.perf_counter() - began
        if (count := _rows(client, config.collection)) != len(vectors.rows):
            raise Failure(f"'{config.collection}' has {count:,} rows after {len(vectors.rows):,} were written")
    run.say(f"{len(vectors.rows):,} rows written in {seconds:.0f} s")
    return {"write_seconds": round(seconds, 1), "rows_per_second": round(len(vectors.rows) / seconds)}


def _rows(client: Any, collection: str) -> int:
    """Rows by Milvus' own books, which need no index; every row of this collection is written once."""
    return int(client.get_collection_stats(collection)["row_count"])


def _index(
    config: BenchConfig, kind: IndexKind, store: "Store", target: "Target", vectors: "Vectors", exact: Any, run: Run
) -> dict[str, Any]:
    """Build one index and measure it."""
    from data_pipelines.bench_rows import row_number
    from data_pipelines.bench_search import added, one_by_one, quantiles, together
    from data_pipelines.bench_vectors import recall

    there = _has_index(config, kind, target)
    run.say(f"{kind} is there already" if there else f"building {kind}")
    began = time.perf_counter()
    store.build_index(config.collection, config.index(kind))
    measured: dict[str, Any] = {
        "index": kind, "build_seconds": None if there else round(time.perf_counter() - began, 1)
    }  # fmt: skip
    points: list[dict[str, Any]] = []
    for effort in config.efforts(kind):
        one_by_one(store, config.collection, vectors.queries[:WARM_UP], config.limit, effort, 0)
        seconds, found = one_by_one(store, config.collection, vectors.queries, config.limit, effort, config.seconds)
        places = [[row_number(name) for name in names] for names in found]
        point: dict[str, Any] = {
            "index": kind,
            "effort": effort,
            "recall": round(recall(places, vectors, exact), 4),
            **quantiles(seconds),
            "searches": len(seconds),
        }
        points.append(point)
        run.say(
            f"{kind} {effort or ''}: recall {point['recall']:.3f}, p50 {point['p50_ms']} ms, p95 {point['p95_ms']} ms"
        )
    chosen = next((point for point in points if point["recall"] >= config.target_recall), points[-1])
    effort = int(chosen["effort"])
    measured["effort"] = effort
    pairs = vectors.queries[: min(PAIRED, max(20, int(config.seconds * 500 / (chosen["p50_ms"] or 1))))]
    measured |= added(store, target, config.collection, pairs, config.limit, effort)
    if config.clients:
        measured["together"] = together(
            target, config.collection, vectors.queries, config.limit, effort, config.clients, config.seconds
        )
        run.say(f"{kind} {effort or ''}: {config.clients} clients, {measured['together']}")
    memory = target.memory()
    measured["memory_mb"] = None if memory is None else memory >> 20
    folder = config.storage if is_server(config.uri) else Path(config.uri)
    measured["disk_mb"] = None if folder is None else _bytes(folder) >> 20
    return {**measured, "points": points}


def _has_index(config: BenchConfig, kind: IndexKind, target: "Target") -> bool:
    """Whether the index was built, or begun, before."""
    with target.client() as client:
        if "vector" not in client.list_indexes(config.collection):
            return False
        return config.index(kind).matches(client.describe_index(config.collection, "vector"))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
