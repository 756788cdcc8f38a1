"""An embedding run may die at any moment: started again, it ends with the rows of an undisturbed run."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import ROUNDS, dice, found

from data_pipelines.selection import document_of
from data_pipelines.store import Store

ROWS = 240
PROGRESS = re.compile(r"(\d+) of (\d+) embedded")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts long enough that a run takes some seconds, every tenth of them of several chunks."""
    path = tmp_path_factory.mktemp("kill") / "documents.parquet"
    texts = [
        f"Document {i} counts {' '.join(str(i * k) for k in range(300 if i % 10 == 0 else 60))}." for i in range(ROWS)
    ]
    pq.write_table(pa.table({"id": [f"doc-{i:04d}" for i in range(ROWS)], "text": texts}), path, row_group_size=40)
    return path


@pytest.fixture(scope="module")
def undisturbed(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The rows of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(documents, folder))
    return contents(folder)


def start(documents: Path, folder: Path) -> subprocess.Popen[str]:
    """``workbench data embed`` in a process of its own, with a Ray of its own."""
    command = [sys.executable, "-m", "workbench", "data", "embed", "--json", f"documents={documents}"]
    command += [f"uri={folder / 'm.db'}", "batch_size=8", "cpus_per_worker=0.5"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"WORKBENCH_RUNS_ROOT": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    """Wait for the run and give its summary."""
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return dict(json.loads(output))


def halfway(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until a part, not all, is embedded; the processes of the run without its first."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if (match := PROGRESS.match(line)) and int(match[1]) < int(match[2]):
            return psutil.Process(process.pid).children(recursive=True)
    raise AssertionError(f"the run ended before it was seen halfway: {''.join(seen[-20:])}")


def contents(folder: Path, wait: float = 0) -> dict[str, tuple[int, int]]:
    """Content hash and chunk count of every row by id, read once the folder is free, ``wait`` seconds at most."""
    store = Store(str(folder / "m.db"), wait=wait)
    try:
        return store.contents("documents") or {}
    finally:
        store.close()


def whole(rows: dict[str, tuple[int, int]]) -> int:
    """How many documents have all their chunks."""
    counted = Counter(document_of(row) for row in rows)
    return sum(counted[document_of(row)] == chunks for row, (_, chunks) in rows.items() if row.endswith("#0"))


def test_killed_driver(documents: Path, undisturbed: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Killed with SIGKILL (twice in 'make soak') and begun again, the run keeps what is there and completes it."""
    before = 0
    left: list[psutil.Process] = []
    for _ in range(min(2, ROUNDS)):
        process = start(documents, tmp_path)
        left += halfway(process)
        process.kill()
        process.wait()
        after = whole(contents(tmp_path, wait=60))
        assert before < after < ROWS
        before = after
    summary = finish(start(documents, tmp_path))
    assert (summary["already_there"], summary["embedded"]) == (before, ROWS - before)
    assert contents(tmp_path) == undisturbed
    if ROUNDS > 1:  # Ray's agents look for their dead head for about a minute before they follow it
        _, alive = psutil.wait_procs(left, timeout=150)
        assert not alive


def test_killed_worker_and_owner(documents: Path, undisturbed: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """A run survives the death of an embedding worker and of the actor that has the folder open."""
    process = start(documents, tmp_path)
    children = {" ".join(child.cmdline()): child for child in halfway(process)}
    for title in ("MapBatches(Embed", "ray::Owner"):
        next(child for name, child in children.items() if title in name).kill()
    summary = finish(process)
    assert summary["missing"] == 0
    assert contents(tmp_path) == undisturbed


@pytest.mark.skipif(ROUNDS < 2, reason="'make soak' runs it")
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_random(
    documents: Path, undisturbed: dict[str, tuple[int, int]], tmp_path: Path, number: int
) -> None:
    """Workers, owner and at last the driver are killed at random moments; then it is begun again."""
    chance = dice("lite", number)
    process = start(documents, tmp_path)
    moments = sorted((chance.uniform(0, 25), chance.choice(["MapBatches(Embed", "ray::Owner"])) for _ in range(2))
    print("kills:", moments)
    began = time.monotonic()
    for moment, title in [*moments, (chance.uniform(5, 35), "driver")]:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        if title == "driver":
            process.kill()
        elif victims := found(process.pid, title):
            chance.choice(victims).kill()
    process.communicate()
    assert finish(start(documents, tmp_path))["missing"] == 0
    assert contents(tmp_path) == undisturbed
