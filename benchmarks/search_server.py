"""``python -m benchmarks.search_server --vectors FOLDER``: the packaged Milvus server and Milvus Lite, side by side.

Each index of each Milvus is one run of ``workbench data bench``, whose report has the figure of recall against latency;
this starts the server, and puts the runs' figures side by side. Data and results stay in ``--folder``: with ``--only
server --indexes HNSW`` a part is measured anew, without writing the vectors again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.config import CHECKOUT, runs_root
from workbench.errors import Failure

INDEXES = "FLAT,IVF_FLAT,HNSW"


def main(
    rows: Annotated[int, typer.Option(help="Vectors to search.")] = 500_000,
    vectors: Annotated[
        Path | None, typer.Option(help="Real embeddings: .npy, or .parquet with a column vector.")
    ] = None,
    only: Annotated[str, typer.Option(help="server or lite; both if empty.")] = "",
    indexes: Annotated[str, typer.Option(help="Which, in this order.")] = INDEXES,
    seconds: Annotated[float, typer.Option(help="The most that one measurement takes.")] = 20,
    folder: Annotated[Path | None, typer.Option(help="Where data and results stay.")] = None,
) -> None:
    """Measure, and print a table in Markdown."""
    folder = (folder or runs_root() / "search-server").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    common = [f"rows={rows}", f"seconds={seconds}", *([f"vectors={vectors.resolve()}"] if vectors else [])]
    results = folder / f"results-{rows}.json"
    seen: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    for place in [only] if only else ["server", "lite"]:
        for index, summary in _measure(place, folder, indexes.split(","), common):
            _keep_times(summary, [before for name, before in seen.items() if name.startswith(place)])
            seen[f"{place} {index}"] = summary
            results.write_text(json.dumps(seen, indent=1))
    print(_table(seen))


def _keep_times(summary: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Take the times of what was there already from the run that made it."""
    [index] = summary["indexes"]
    for before in earlier:
        if before["vectors"] == summary["vectors"]:
            summary["write_seconds"] = summary["write_seconds"] or before["write_seconds"]
            [same] = before["indexes"]
            if same["index"] == index["index"]:
                index["build_seconds"] = index["build_seconds"] or same["build_seconds"]


def _measure(place: str, folder: Path, indexes: list[str], common: list[str]) -> Any:
    """(index, summary) of each run."""
    if place == "lite":
        for index in indexes:
            yield index, _bench(index, [f"uri={folder / 'lite.db'}", *common], None)
        return
    sys.path.insert(0, str(CHECKOUT / "tests"))
    from milvus_server import milvus_server, missing

    if reason := missing():
        raise Failure(reason)
    with milvus_server(folder / "server") as server:
        for index in indexes:
            overrides = [f"uri={server.uri}", f"storage={server.folder}", *common]
            yield index, _bench(index, overrides, server)


def _bench(index: str, overrides: list[str], server: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "workbench", "data", "bench", "--json", f"indexes=[{index}]", *overrides]
    inside = server.inside(command) if server is not None else command
    done = subprocess.run(inside, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, env=os.environ)
    if done.returncode:
        raise Failure(f"exit code {done.returncode} from {' '.join(command)}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _table(seen: dict[str, Any]) -> str:
    names = ["Milvus", "index", "written s", "built s", "effort", "recall@10", "p50 ms", "p95", "p99", "searches",
             "8 clients/s", "their p95", "ours adds ms", "memory MB", "disk MB"]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for name, summary in seen.items():
        [index] = summary["indexes"]
        together = index.get("together", {})
        for point in summary["points"]:
            chosen = point["effort"] == index["effort"]
            cells = [
                name.split()[0], point["index"], summary["write_seconds"], index["build_seconds"], point["effort"],
                point["recall"], point["p50_ms"], point["p95_ms"], point["p99_ms"], point["searches"],
                together.get("per_second") if chosen else "", together.get("p95_ms") if chosen else "",
                index["added_ms"] if chosen else "", index["memory_mb"], index["disk_mb"],
            ]  # fmt: skip
            lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    origins = sorted({summary["vectors"] for summary in seen.values()})
    return "\n".join([*lines, "", *origins])


if __name__ == "__main__":
    typer.run(main)
