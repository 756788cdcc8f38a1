"""A cluster of several raylets on this host, for tests that kill some of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from workbench.session import NAMESPACE, QUIET, _use_token, make_token, object_store_bytes, state_folder

FOUND_SOON = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "1000",
}  # fmt: skip


@contextmanager
def bare_head() -> Iterator[Any]:
    """A cluster whose head has no cores."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    before = dict(os.environ)
    os.environ.update({**QUIET, **FOUND_SOON})
    _use_token(make_token(state_folder() / "auth_token"))
    made = Cluster()
    try:
        made.add_node(num_cpus=0, object_store_memory=min(object_store_bytes(), 200 << 20), include_dashboard=False)
        ray.init(address=made.address, namespace=NAMESPACE, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


def host(cluster: Any) -> Any:
    """One more raylet, with a core."""
    return cluster.add_node(num_cpus=1, object_store_memory=min(object_store_bytes(), 200 << 20))
