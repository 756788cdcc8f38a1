"""Searches that are timed: one after another, by several clients at once, and ours in turn with a bare pymilvus one."""

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data_pipelines.lite import LiteFolder
from data_pipelines.store import HIT_FIELDS, Store, is_server
from data_pipelines.vector_index import search_params
from workbench.errors import Failure

CLIENT_SECONDS = 300
"""How long the slowest client may take to start and to end."""
LEAST = 20
"""Searches that are made even if they take longer than they may."""


@dataclass(frozen=True)
class Target:
    """Where searches go: the ``address`` of a Milvus server, or of a Milvus Lite that a process of ours serves, with
    the process id where it runs on this machine."""

    address: str
    token: str
    pid: int | None
    lite: bool = False

    def has_keywords(self, store: Store) -> bool:
        """Whether this Milvus also finds texts by their words."""
        return self.lite or store.has_keywords()

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A pymilvus client with a connection of its own."""
        from pymilvus import MilvusClient

        client = MilvusClient(uri=self.address, token=self.token, dedicated=True)
        try:
            yield client
        finally:
            client.close()

    def memory(self) -> int | None:
        """Resident bytes of Milvus' process, or None where it runs elsewhere."""
        import psutil

        return int(psutil.Process(self.pid).memory_info().rss) if self.pid else None


@contextmanager
def open_target(uri: str, token: str) -> Iterator[Target]:
    """A server as it is, or a Milvus Lite folder in a process of its own, as its owner has it."""
    if is_server(uri):
        yield Target(uri, token, _listener(uri))
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_lite, args=(uri, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
        if isinstance(answer, Exception):
            raise answer
        yield Target(answer, "", process.pid, lite=True)
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            process.kill()


def _serve_lite(uri: str, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent closes the pipe
    try:
        lite = LiteFolder(Path(uri))
    except Exception as error:
        connection.send(error)
        return
    connection.send(lite.address)
    try:
        connection.recv()
    except EOFError:  # the parent is done
        lite.close()


def _listener(uri: str) -> int | None:
    """The process on this machine that listens where ``uri`` says, as far as this user may know."""
    import psutil

    place = urlsplit(uri)
    if place.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", 0) == (
                place.port or 19530
            ):
                return connection.pid
    except psutil.AccessDenied:
        pass
    return None


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds; None for one that so few searches do not show."""
    milliseconds = np.array(seconds) * 1e3
    shown: dict[str, float | None] = {}
    for name, share, needed in (("p50_ms", 0.5, 1), ("p95_ms", 0.95, 20), ("p99_ms", 0.99, 100)):
        shown[name] = round(float(np.quantile(milliseconds, share)), 2) if len(milliseconds) >= needed else None
    return shown


def one_by_one(
    store: Store, collection: str, queries: np.ndarray, limit: int, effort: int, seconds: float
) -> tuple[list[float], list[list[str]]]:
    """Search for each query in turn until ``seconds`` have passed: (seconds of each, ids found by each)."""
    taken, found = [], []
    end = time.perf_counter() + seconds
    for query in queries:
        began = time.perf_counter()
        hits = store.search(collection, query, limit, effort=effort)
        now = time.perf_counter()
        taken.append(now - began)
        found.append([hit["id"] for hit in hits])
        if now > end and len(taken) >= LEAST:
            break
    return taken, found


def together(
    target: Target, collection: str, queries: np.ndarray, limit: int, effort: int, clients: int, seconds: float
) -> dict[str, Any]:
    """``clients`` processes search for ``seconds``, each as soon as it has its answer: searches a second, quantiles."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(clients), context.Queue()
    processes = [
        context.Process(
            target=_client, daemon=True,
            args=(target, collection, np.roll(queries, number * len(queries) // clients, axis=0), limit, effort,
                  seconds, barrier, answers),
        )
        for number in range(clients)
    ]  # fmt: skip
    for process in processes:
        process.start()
    try:
        results = [answers.get(timeout=seconds + CLIENT_SECONDS) for _ in processes]
    except queue.Empty:
        raise Failure(f"a client of {clients} did not answer within {seconds + CLIENT_SECONDS:.0f} s") from None
    for process in processes:
        process.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    taken = [each for result in results for each in result]
    return {
        "clients": clients,
        "searches": len(taken),
        "per_second": round(len(taken) / seconds, 1),
        **quantiles(taken),
    }


def _client(
    target: Target, collection: str, queries: np.ndarray, limit: int, effort: int, seconds: float, barrier: Any,
    answers: Any,
) -> None:  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        store = Store(target.address, target.token)
        for query in queries[:5]:
            store.search(collection, query, limit, effort=effort)
        barrier.wait(CLIENT_SECONDS)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            store.search(collection, queries[len(taken) % len(queries)], limit, effort=effort)
            taken.append(time.perf_counter() - began)
        answers.put(taken)
    except Exception as error:
        barrier.abort()
        answers.put(RuntimeError(f"client {os.getpid()}: {type(error).__name__}: {error}"))


def added(
    store: Store, target: Target, collection: str, queries: np.ndarray, limit: int, effort: int
) -> dict[str, Any]:
    """What ``Store.search`` adds to the same search by a bare pymilvus client: both for each query, in changing order.

    The difference is taken query by query; its median and the middle half of the differences are given.
    """

    def bare(query: np.ndarray) -> None:
        client.search(
            collection, [query.tolist()], anns_field="vector", limit=limit, output_fields=HIT_FIELDS,
            search_params=search_params(limit, effort),
        )  # fmt: skip

    def ours(query: np.ndarray) -> None:
        store.search(collection, query, limit, effort=effort)

    taken: dict[Any, list[float]] = {bare: [], ours: []}
    with target.client() as client:
        for number, query in enumerate(queries):
            for search in (bare, ours) if number % 2 else (ours, bare):
                began = time.perf_counter()
                search(query)
                taken[search].append(time.perf_counter() - began)
    difference = (np.array(taken[ours]) - np.array(taken[bare])) * 1e3
    low, middle, high = (round(float(value), 3) for value in np.quantile(difference, (0.25, 0.5, 0.75)))
    return {
        "searches": len(queries),
        "bare_p50_ms": quantiles(taken[bare])["p50_ms"],
        "ours_p50_ms": quantiles(taken[ours])["p50_ms"],
        "added_ms": middle,
        "added_quarter_ms": low,
        "added_three_quarters_ms": high,
    }
