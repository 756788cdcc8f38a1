"""The one process of a cluster that has a Milvus Lite folder open: a named actor that writers and readers ask.

    owner = hold(uri)
    ray.get(owner.upsert.remote(...))
    release(owner)

Milvus Lite lets a single process open a folder, so this actor stands on the node that called ``hold`` first. A server
needs none: whoever writes to it opens a ``Store`` of its own.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipelines.collection import Collection
from data_pipelines.store import Store, is_server
from data_pipelines.vector_index import Index
from workbench.errors import Failure, UserError
from workbench.session import NAMESPACE

WAIT_SECONDS = 45
"""How long a run waits for a folder to be let go: the processes of a killed one need some seconds to end."""


class Owner:
    """Every method is one of ``Store``'s; the folder is opened at the first of them, also after a restart."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._open: Store | None = None

    def _store(self) -> Store:
        if self._open is None:
            self._open = Store(self._uri, wait=WAIT_SECONDS)
        return self._open

    def has_keywords(self) -> bool:
        return self._store().has_keywords()

    def collection(self, name: str) -> Collection | None:
        return self._store().collection(name)

    def collections(self) -> list[str]:
        return self._store().collections()

    def contents(self, collection: str) -> dict[str, tuple[int, int]] | None:
        return self._store().contents(collection)

    def upsert(self, collection: Collection, table: Any) -> int:
        return self._store().upsert(collection, table)

    def delete(self, collection: str, ids: list[str]) -> None:
        self._store().delete(collection, ids)

    def build_index(self, collection: str, index: Index) -> None:
        self._store().build_index(collection, index)

    def search(self, collection: str, vector: Any, limit: int, **options: Any) -> list[dict[str, Any]]:
        return self._store().search(collection, vector, limit, **options)

    def count(self, collection: str) -> int:
        return self._store().count(collection)

    def close(self) -> None:
        """Let the folder go; the next call opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None


def actor_name(uri: str) -> str:
    """The name under which a cluster's owner of ``uri`` is found."""
    return f"milvus-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def find(uri: str) -> Any | None:
    """The owner of ``uri`` in this cluster, or None."""
    try:
        return ray.get_actor(actor_name(uri), NAMESPACE)
    except ValueError:
        return None


def hold(uri: str) -> Any:
    """The owner of ``uri`` in this cluster, made on this node if there is none yet.

    It lives as long as this job, or until ``release``. If it dies it is restarted and its
    unfinished calls are made again, which is safe because every write is an upsert by id.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(Owner)
        .options(
            name=actor_name(uri),
            namespace=NAMESPACE,
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=here,
        )
        .remote(uri)
    )


def ask(reference: Any) -> Any:
    """``ray.get`` that raises what the owner raised, UserError and Failure included."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise root_cause(error) from None


def root_cause(error: BaseException) -> BaseException:
    """The UserError or Failure at the bottom of ``error``'s causes, or ``error`` itself."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        for candidate in (cause, inner):
            if isinstance(candidate, UserError | Failure) and not isinstance(candidate, RayTaskError):
                return candidate
        cause = inner if isinstance(inner, BaseException) and inner is not cause else cause.__cause__
    return error


def release(owner: Any) -> None:
    """Close the folder and end the actor."""
    ray.get(owner.close.remote())
    ray.kill(owner, no_restart=True)


class ThroughOwner:
    """A ``Store`` whose methods the owner of a folder carries out. ``leave`` is called at the end."""

    def __init__(self, owner: Any, leave: Callable[[], None] = lambda: None) -> None:
        self._owner = owner
        self._leave = leave

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: ask(getattr(self._owner, name).remote(*arguments, **options))

    def close(self) -> None:
        """Leave the owner to others, or end it, as was said."""
        self._leave()


@contextmanager
def writable(uri: str, token: str = "", patience: float = 0) -> Iterator[Any]:
    """``Store`` on a server, or the owner of a folder, which ends with the block if it was made for it."""
    if is_server(uri):
        with closing(Store(uri, token, patience=patience)) as store:
            yield store
        return
    there = find(uri)
    owner = there or hold(uri)
    try:
        yield ThroughOwner(owner)
    finally:
        if there is None:
            release(owner)
