"""``data embed`` against a real Milvus server: what is embedded, changed, deleted, and what survives SIGKILL.

After every round the collection has exactly the source's documents, each whole and as it is now: read by pymilvus, not
by the code that wrote it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import ROUNDS, dice, found, wait_until
from milvus_server import MilvusServer, milvus_server, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DOCUMENTS = 120
WINDOW = 12.0
"""Kills come within this many seconds from when the first embedding worker is there: about what a run takes here."""
RUN_SECONDS = 300

READ = """
import json, sys
from pymilvus import MilvusClient
client, name = MilvusClient(sys.argv[1]), sys.argv[2]
client.load_collection(name)
fields = ["document", "position", "chunks", "text"]
pages = client.query_iterator(name, batch_size=1000, output_fields=fields, consistency_level="Strong")
rows = []
while page := pages.next():
    rows += page
counted = client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
print(json.dumps({"rows": [dict(row) for row in rows], "count": counted[0]["count(*)"]}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """One server for all tests of this file; they have a collection each."""
    with milvus_server(tmp_path_factory.mktemp("milvus")) as server:
        yield server


class Embedding:
    """``workbench data embed`` in the server's namespace, with a Ray of its own."""

    def __init__(self, server: MilvusServer, folder: Path, documents: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self._log = folder / f"{time.monotonic_ns()}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"WORKBENCH_RUNS_ROOT": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.process = server.popen(
                [
                    sys.executable, "-m", "workbench", "data", "embed", "--json", f"documents={documents}",
                    f"uri={server.uri}", f"collection={folder.name}", "batch_size=8", "cpus_per_worker=0.5",
                    "other_rows=delete", *overrides,
                ],
                env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def workers(self) -> list[psutil.Process]:
        """The embedding workers that are alive."""
        return found(self.process.pid, "MapBatches(Embed")

    def await_workers(self) -> None:
        """Wait for the first embedding worker, or the end of the run."""
        wait_until(lambda: self.workers() or self.process.poll() is not None, 120, "no worker embeds")

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the run and give its summary."""
        output, _ = self.process.communicate(timeout=RUN_SECONDS)
        assert self.process.returncode == 0, self._log.read_text()[-3000:]
        return dict(json.loads(output))

    def kill(self) -> None:
        """SIGKILL of the driver alone; what it started is left to notice."""
        self.process.kill()
        self.process.wait()


class Source:
    """Documents in a Parquet file; every sentence of a document names its version."""

    def __init__(self, path: Path, count: int = DOCUMENTS) -> None:
        self.path = path
        self.versions = {f"doc-{number:04d}": 1 for number in range(count)}
        self.write()

    def write(self) -> None:
        """Replace the file."""
        texts = {name: self.text(name) for name in self.versions}
        table = pa.table({"id": list(texts), "title": list(texts), "text": list(texts.values())})
        pq.write_table(table, self.path, row_group_size=max(1, len(texts) // 6))

    def text(self, name: str) -> str:
        """Some hundred tokens."""
        number = int(name[4:])
        numbers = [" ".join(str(number * step + place) for place in range(12)) for step in range(4 + number % 8)]
        return " ".join(f"In {self.mark(name)} the row {row} has {values}." for row, values in enumerate(numbers))

    def mark(self, name: str) -> str:
        """What each sentence of the document says of itself."""
        return f"{name} version {self.versions[name]}"

    def change(self, names: list[str]) -> None:
        """New texts for these documents."""
        for name in names:
            self.versions[name] += 1
        self.write()


def check_collection(server: MilvusServer, collection: str, source: Source) -> None:
    """The collection has exactly the source's documents, each whole, in its present version, every row once."""
    seen = server.python(READ, server.uri, collection)
    chunks: dict[str, list[dict[str, Any]]] = {}
    for row in seen["rows"]:
        chunks.setdefault(row["document"], []).append(row)
    assert len(chunks) == len(source.versions)
    assert chunks.keys() == source.versions.keys()
    repeated = [name for name, times in Counter(row["id"] for row in seen["rows"]).items() if times > 1]
    assert not repeated
    assert seen["count"] == len(seen["rows"])
    for name, rows in chunks.items():
        assert sorted(row["position"] for row in rows) == list(range(rows[0]["chunks"])), name
        assert [row["text"] for row in rows if source.mark(name) not in row["text"]] == [], name


@pytest.mark.soak
def test_embed_search_change_delete(server: MilvusServer, tmp_path: Path) -> None:
    """A run embeds what is new or changed and deletes what is gone; search finds the texts as they are."""
    source = Source(tmp_path / "documents.parquet", count=40)
    folder = tmp_path / "plain"
    first = Embedding(server, folder, source.path).finish()
    assert (first["documents"], first["embedded"], first["missing"]) == (40, 40, 0)
    check_collection(server, "plain", source)

    changed, gone = ["doc-0003", "doc-0017"], ["doc-0005", "doc-0011", "doc-0039"]
    for name in gone:
        del source.versions[name]
    source.change(changed)
    second = Embedding(server, folder, source.path).finish()
    assert (second["documents"], second["embedded"], second["already_there"]) == (37, 2, 35)
    check_collection(server, "plain", source)

    asked = server.run(
        [sys.executable, "-m", "workbench", "data", "search", "--json", f"uri={server.uri}", "collection=plain",
         "limit=3", source.text("doc-0017")[:200]],
        env=os.environ | {"WORKBENCH_RUNS_ROOT": str(folder / "runs")},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    best = json.loads(asked.stdout)["hits"][0]["text"].replace("**", "")
    assert source.mark("doc-0017") in best


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_random(server: MilvusServer, tmp_path: Path, number: int) -> None:
    """A worker, the server and then the driver are killed in one embedding, documents change, and it is begun again:
    nothing is lost, nothing is there twice, nothing is old."""
    chance = dice("all", number)
    source = Source(tmp_path / "documents.parquet")
    folder = tmp_path / f"all_{number}"
    run = Embedding(server, folder, source.path)
    run.await_workers()
    victims = chance.sample(["worker", "server"], 2)
    for victim in victims:
        moment = chance.uniform(0, WINDOW / 2)
        print(f"{victim} after {moment:.2f} s more")
        time.sleep(moment)
        if victim == "server":
            restart(server, chance.uniform(0, 5))
        else:
            kill_worker(run, chance.random())
    moment = chance.uniform(0, WINDOW / 2)
    print(f"driver after {moment:.2f} s more")
    time.sleep(moment)
    run.kill()
    source.change(chance.sample(sorted(source.versions), 5))
    assert Embedding(server, folder, source.path).finish()["missing"] == 0
    check_collection(server, folder.name, source)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_password_and_tls(tmp_path: Path) -> None:
    """Only with the certificate's authority and the right password."""
    authority = certificate(tmp_path)
    settings: dict[str, Any] = {
        "authorization_enabled": True, "tls_mode": 1, "ca_pem_path": str(authority),
        "server_pem_path": str(tmp_path / "server.pem"), "server_key_path": str(tmp_path / "server.key"),
    }  # fmt: skip
    trusted = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(authority)}
    known = {"MILVUS_TOKEN": "root:Milvus", **trusted}
    with milvus_server(tmp_path / "milvus", **settings) as server:
        assert bench(server, tmp_path, known)["write_seconds"] is not None
        for lacking in (trusted, {**trusted, "MILVUS_TOKEN": "root:wrong-one"}, {"MILVUS_TOKEN": "root:Milvus"}):
            refused = bench(server, tmp_path, lacking, code=2)
            assert "https://localhost" in refused["error"]
            assert "Traceback" not in refused["error"] and "wrong-one" not in refused["error"]


def bench(
    server: MilvusServer, folder: Path, variables: dict[str, str], code: int = 0, uri: str = "https://localhost:19530"
) -> dict[str, Any]:
    """The summary of a tiny ``data bench``, or what it said."""
    done = server.run(
        [sys.executable, "-m", "workbench", "data", "bench", "--json", f"uri={uri}", "rows=200",
         "dimension=8", "searches=20", "seconds=0.2", "clients=0", "indexes=[FLAT]"],
        env=os.environ | {"WORKBENCH_RUNS_ROOT": str(folder / "runs")} | variables,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    return dict(json.loads(done.stdout)) if code == 0 else {"error": done.stderr}


def certificate(folder: Path) -> Path:
    """``server.key`` and ``server.pem`` for localhost, and the authority that signed it."""
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem"


soak = pytest.mark.skipif(ROUNDS < 2, reason="'make soak' runs it")


@soak
def test_a_copy_of_a_stopped_server_is_a_backup(tmp_path: Path) -> None:
    with milvus_server(tmp_path / "milvus") as server:
        assert bench(server, tmp_path, {}, uri=server.uri)["write_seconds"] is not None
    shutil.copytree(tmp_path / "milvus" / "data", tmp_path / "copy" / "data")
    with milvus_server(tmp_path / "copy") as server:
        assert bench(server, tmp_path, {}, uri=server.uri)["write_seconds"] is None, "the vectors are in the copy"


@soak
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_workers(server: MilvusServer, tmp_path: Path, number: int) -> None:
    """One to three embedding workers are killed; the same run ends with every document."""
    chance = dice("workers", number)
    source = Source(tmp_path / "documents.parquet")
    run = Embedding(server, tmp_path / f"workers_{number}", source.path)
    for moment in sorted(chance.uniform(0, WINDOW) for _ in range(chance.randint(1, 3))):
        run.await_workers()
        time.sleep(moment / 3)
        kill_worker(run, chance.random())
    assert run.finish()["missing"] == 0
    check_collection(server, f"workers_{number}", source)


@soak
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_server(server: MilvusServer, tmp_path: Path, number: int) -> None:
    """The server is killed once or twice and comes back; the same run waits for it and ends with every document."""
    chance = dice("server", number)
    source = Source(tmp_path / "documents.parquet")
    run = Embedding(server, tmp_path / f"server_{number}", source.path)
    run.await_workers()
    for _ in range(chance.randint(1, 2)):
        time.sleep(chance.uniform(0, WINDOW))
        restart(server, chance.uniform(0, 10))
    assert run.finish()["missing"] == 0
    check_collection(server, f"server_{number}", source)


@soak
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_drivers(server: MilvusServer, tmp_path: Path, number: int) -> None:
    """The driver is killed one to three times, at any moment of its life, and documents change between two runs."""
    chance = dice("drivers", number)
    source = Source(tmp_path / "documents.parquet")
    folder = tmp_path / f"drivers_{number}"
    for _ in range(chance.randint(1, 3)):
        run = Embedding(server, folder, source.path)
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(chance.uniform(0, 12 + WINDOW))
        run.kill()
        source.change(chance.sample(sorted(source.versions), 5))
    assert Embedding(server, folder, source.path).finish()["missing"] == 0
    check_collection(server, folder.name, source)


def restart(server: MilvusServer, seconds: float) -> None:
    """SIGKILL of the server, which is started again ``seconds`` later."""
    server.kill()
    time.sleep(seconds)
    server.start()


def kill_worker(run: Embedding, choice: float) -> None:
    """SIGKILL of one of the embedding workers, if there is one."""
    workers = run.workers()
    if workers:
        worker = workers[int(choice * len(workers))]
        print("killed", worker.pid, worker.cmdline())
        with suppress(psutil.NoSuchProcess):
            worker.kill()
