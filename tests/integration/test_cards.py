"""Requests on a real Ray of three hosts: which cards a process sees while everybody competes for them.

The hosts are raylets on loopback with the labels, resources and CUDA_VISIBLE_DEVICES that the bring-up gives them; a
card is its UUID, for Ray hands out cards without looking at them.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from made_cluster import INVENTORY, RTX_5060_TI, RTX_5090, RTX_PRO_6000

from cluster.labels import HOST, host_labels, host_resources, plain_cards
from cluster.nodes import member_nodes
from cluster.placement import Placement, place, place_here
from workbench.errors import UserError
from workbench.resources import CardNeed, ResourceRequest
from workbench.session import NAMESPACE, QUIET, _use_token, make_token, object_store_bytes, state_folder

PLAIN = {"system-a": RTX_5090, "linux-box": RTX_5060_TI}
PRO = ResourceRequest(gpu=CardNeed(model="rtx-pro-6000"))
ANY = ResourceRequest(gpu=CardNeed())
ALL = ResourceRequest.model_validate({"gpus": "all on system-a"})


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    before = dict(os.environ)
    os.environ.update(QUIET)
    _use_token(make_token(state_folder() / "auth_token"))
    cluster = Cluster()
    try:
        for number, (name, host) in enumerate(INVENTORY.hosts.items()):
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(card.uuid for card in plain_cards(host))
            cluster.add_node(
                node_ip_address=f"127.0.0.{number + 12}",
                num_cpus=host.cpus,
                num_gpus=len(plain_cards(host)),
                resources=host_resources(host),
                labels=host_labels(name, host),
                object_store_memory=min(object_store_bytes(), 200 << 20),
                include_dashboard=False,
            )
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def seen() -> dict[str, Any]:
    """What this process is told of cards, and where it runs."""
    return {
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "host": ray.get_runtime_context().get_node_labels()[HOST],
    }


@ray.remote(max_retries=0)
def look(seconds: float = 0.0) -> dict[str, Any]:
    began = time.time()
    time.sleep(seconds)
    return {**seen(), "began": began, "ended": time.time()}


@ray.remote
class Holder:
    def look(self) -> dict[str, Any]:
        return seen()


def here(request: ResourceRequest, workers: int = 1) -> Placement:
    return place(request, member_nodes(), workers=workers)


def until_free(name: str, seconds: float = 30) -> None:
    """Wait until nobody holds any of ``name``."""
    deadline = time.monotonic() + seconds
    while ray.available_resources().get(name, 0) < ray.cluster_resources()[name]:
        assert time.monotonic() < deadline, f"somebody still holds {name}"
        time.sleep(0.1)


def overlaps(spans: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The pairs of spans that ran at the same time."""
    ordered = sorted(spans, key=lambda span: span["began"])
    return [
        (first["ended"], then["began"])
        for first, then in itertools.pairwise(ordered)
        if then["began"] < first["ended"] - 1e-3
    ]


def test_the_card_asked_for_is_the_card_seen_while_plain_tasks_compete(three_hosts: None) -> None:
    plain = [look.options(**here(ANY).options()).remote(0.1) for _ in range(12)]
    named = [look.options(**here(PRO).options()).remote(0.1) for _ in range(6)]
    by_name = [look.options(**here(ResourceRequest(gpu=CardNeed(model="rtx-5090"))).options()).remote(0.1)
               for _ in range(3)]  # fmt: skip
    no_card = [look.options(num_cpus=1).remote() for _ in range(12)]
    pro, others, fives = ray.get(named), ray.get(plain), ray.get(by_name)
    assert {(one["cards"], one["host"]) for one in pro} == {(RTX_PRO_6000, "system-a")}
    assert all(one["cards"] == PLAIN[one["host"]] for one in others)
    assert {(one["cards"], one["host"]) for one in fives} == {(RTX_5090, "system-a")}
    assert {one["cards"] for one in ray.get(no_card)} == {""}
    assert not overlaps(pro)
    for host in PLAIN:
        assert not overlaps([one for one in others + fives if one["host"] == host])


@pytest.mark.soak
def test_a_train_group_and_serve_replicas_get_their_cards_while_tasks_compete(three_hosts: None, tmp_path: Any) -> None:
    from ray import serve

    pro, plain = here(PRO), here(ANY)
    assert train(pro, 1, str(tmp_path / "alone")) == [{"cards": RTX_PRO_6000, "host": "system-a"}]

    @serve.deployment(max_ongoing_requests=1)
    class Replica:
        def __call__(self) -> dict[str, Any]:
            return seen()

    try:
        half = here(ResourceRequest(gpu=CardNeed(model="rtx-pro-6000"), share=0.5))
        handle = serve.run(
            Replica.options(num_replicas=2, ray_actor_options=half.options()).bind(), name="halves", route_prefix=None
        )
        tasks = [look.options(**plain.options()).remote(0.05) for _ in range(20)]
        both = train(plain, 2, str(tmp_path / "plain"))
        assert {one["cards"] for one in [handle.remote().result(timeout_s=60) for _ in range(4)]} == {RTX_PRO_6000}
        assert sorted(one["cards"] for one in both) == sorted(PLAIN.values())
        assert all(one["cards"] == PLAIN[one["host"]] for one in ray.get(tasks))
        assert "0 of 1 rtx-pro-6000 free" in here(PRO).waits
    finally:
        serve.shutdown()


def train(placement: Placement, workers: int, folder: str) -> list[dict[str, Any]]:
    """What each worker of a Ray Train group of ``placement`` sees, by the set-up that the training commands use."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from workloads.training.config import TrainingConfig
    from workloads.training.devices import torch_config

    torch_setup = torch_config(placement, TrainingConfig(workers=workers))
    torch_setup.backend = "gloo"  # there are no real cards

    def worker() -> list[dict[str, Any]]:
        import torch.distributed as dist

        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, seen())
        return told

    trainer = TorchTrainer(
        worker,
        torch_config=torch_setup,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=placement.num_gpus > 0, resources_per_worker=placement.bundle(),
            label_selector=placement.label_selector or None,
        ),
        run_config=RunConfig(storage_path=folder, worker_runtime_env=placement.runtime_env() or None),
    )  # fmt: skip
    told: list[dict[str, Any]] = trainer.fit().return_value
    return told


def test_all_on_a_host_gets_every_card_at_one_address(three_hosts: None, tmp_path: Any) -> None:
    until_free("rtx-pro-6000")
    both = f"{RTX_5090},{RTX_PRO_6000}"
    holder = Holder.options(**here(ALL).options()).remote()
    assert ray.get(holder.look.remote()) == {"cards": both, "host": "system-a"}
    assert [ray.get(look.options(**here(ANY).options()).remote())["host"] for _ in range(4)] == ["linux-box"] * 4
    assert "0 of 1 rtx-pro-6000 free" in here(PRO).waits
    ray.kill(holder)
    until_free("rtx-pro-6000")
    until_free("GPU")
    group = train(here(ALL, workers=2), 2, str(tmp_path))
    assert group == [{"cards": both, "host": "system-a"}] * 2


def test_plain_requests_never_land_on_the_mac(three_hosts: None) -> None:
    flood = [look.options(num_gpus=0.25, num_cpus=0).remote() for _ in range(40)]
    assert {one["host"] for one in ray.get(flood)} <= set(PLAIN)
    mac = ray.get(look.options(**here(ResourceRequest(mps=1)).options()).remote())
    assert mac == {**mac, "cards": "", "host": "mac"}


def test_a_trial_of_a_sweep_sees_the_card_it_was_given(three_hosts: None, tmp_path: Any) -> None:
    from ray import tune

    from workbench.config import adopt_environment

    until_free("rtx-pro-6000")
    placement = here(PRO)

    def trial(point: dict[str, Any]) -> None:
        adopt_environment(placement.env_vars)
        tune.report({"point": point["x"], **seen()})

    needs = tune.PlacementGroupFactory([{"CPU": 1, **placement.bundle()}],
                                       bundle_label_selector=[placement.label_selector])  # fmt: skip
    results = tune.Tuner(
        tune.with_resources(trial, needs),
        param_space={"x": tune.grid_search([1, 2])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert [(one.metrics["cards"], one.metrics["host"]) for one in results] == [(RTX_PRO_6000, "system-a")] * 2


@pytest.mark.parametrize(
    ("resources", "engine", "cards", "bundles"),
    [
        ({"gpu": "rtx-pro-6000"}, {}, RTX_PRO_6000, [{"rtx-pro-6000": 1}]),
        ({"gpus": "all on system-a"}, {"tensor_parallel_size": 2}, f"{RTX_5090},{RTX_PRO_6000}",
         [{"GPU": 1, "rtx-5090": 1, "rtx-pro-6000": 1}]),
        ({"gpu": "rtx-5060-ti"}, {}, "", [{"GPU": 1, "rtx-5060-ti": 1}]),
    ],
)  # fmt: skip
def test_the_replica_of_a_served_model_sees_its_cards(
    three_hosts: None, resources: dict[str, Any], engine: dict[str, Any], cards: str, bundles: list[dict[str, float]]
) -> None:
    """The options that ``ray.serve.llm`` makes of a model, given to a deployment that looks instead of loading."""
    pytest.importorskip("vllm")
    from ray import serve
    from ray.llm._internal.serve.core.server.llm_server import LLMServer

    from serve.engine import ModelConfig, engine_place, llm_config

    for name in ("rtx-pro-6000", "GPU"):
        until_free(name)
    model = ModelConfig.model_validate(
        {"name": "m", "source": "owner/model", "engine": engine, "resources": resources, "cpus": 0.5}
    )
    options = LLMServer.get_deployment_options(llm_config(model, engine_place(model, member_nodes())))
    asked = [{k: v for k, v in bundle.items() if v and k != "CPU"} for bundle in options["placement_group_bundles"]]
    assert asked == bundles

    @serve.deployment
    class Replica:
        def __call__(self) -> dict[str, Any]:
            return seen()

    try:
        handle = serve.run(Replica.options(**options).bind(), name="model", route_prefix=None)
        told = handle.remote().result(timeout_s=60)
    finally:
        serve.shutdown()
    assert told["host"] == ("linux-box" if "5060" in str(resources) else "system-a")
    if cards:
        assert told["cards"] == cards


def test_what_no_host_has_is_refused_and_what_is_held_is_named(three_hosts: None) -> None:
    until_free("rtx-pro-6000")
    with pytest.raises(UserError, match=r"the nearest is rtx-5090 \(32 GB\) on system-a"):
        here(ResourceRequest(gpu=CardNeed(model="rtx-4090")))
    holder = Holder.options(**here(PRO).options()).remote()
    ray.get(holder.look.remote())
    said: list[str] = []
    waiting = look.options(**place_here(PRO, said.append).options()).remote()
    assert said == ["waits for rtx-pro-6000: system-a has 0 of 1 rtx-pro-6000 free"]
    assert ray.wait([waiting], timeout=2) == ([], [waiting])
    ray.kill(holder)
    assert ray.get(waiting, timeout=30)["cards"] == RTX_PRO_6000
