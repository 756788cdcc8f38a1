"""Requests for cards on the cluster's hosts: who gets which while everybody competes, and what is refused."""

import itertools
import json

import pytest

from lab.cards import RTX_5060_TI, RTX_5090, RTX_PRO_6000
from lab.site import BOX, HEAD, SPARE, Site, until

pytestmark = pytest.mark.lab

COMPETE = """
import json, os, time, ray
from cluster.nodes import member_nodes
from cluster.placement import place
from workbench.resources import ResourceRequest
ray.init(log_to_driver=False)
nodes = member_nodes()

@ray.remote(max_retries=0)
def see(seconds=0.2):
    began = time.time()
    time.sleep(seconds)
    return {"cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "host": os.uname().nodename,
            "address": ray.util.get_node_ip_address(), "began": began, "ended": time.time()}

def ask(count, **request):
    options = place(ResourceRequest.model_validate(request), nodes).options()
    return [see.options(**options).remote() for _ in range(count)]

tasks = {
    "any": ask(8, gpu="any"), "pro": ask(4, gpu="rtx-pro-6000"), "5090": ask(3, gpu="rtx-5090"),
    "5060": ask(3, gpu="rtx-5060-ti"), "big": ask(2, gpu={"memory": ">=64GB"}), "cpu": ask(6, cpu=0.1),
    "plain": [see.options(num_gpus=1).remote() for _ in range(4)],
    "half": ask(4, gpu="rtx-5060-ti", share=0.5), "both": ask(2, gpus="all on system-a"),
}
print(json.dumps({name: ray.get(refs, timeout=150) for name, refs in tasks.items()}))
"""


def overlapping(tasks: list[dict[str, float]]) -> bool:
    ordered = sorted(tasks, key=lambda task: task["began"])
    return any(then["began"] < first["ended"] - 1e-3 for first, then in itertools.pairwise(ordered))


def test_every_request_gets_its_card_and_nobody_elses(site: Site) -> None:
    seen = json.loads(site.python(HEAD, COMPETE, timeout=240).splitlines()[-1])
    pairs = {name: {(one["cards"], one["host"]) for one in tasks} for name, tasks in seen.items()}
    plain = {(RTX_5090.uuid, HEAD), (RTX_5060_TI.uuid, BOX)}
    assert pairs["pro"] == pairs["big"] == {(RTX_PRO_6000.uuid, HEAD)}
    assert pairs["5090"] == {(RTX_5090.uuid, HEAD)}
    assert pairs["5060"] == pairs["half"] == {(RTX_5060_TI.uuid, BOX)}
    assert pairs["any"] <= plain and pairs["plain"] <= plain, "a plain request never gets the reserved card"
    assert {cards for cards, _ in pairs["cpu"]} == {""}
    for both in seen["both"]:
        assert set(both["cards"].split(",")) == {RTX_5090.uuid, RTX_PRO_6000.uuid}
        assert both["host"] == HEAD and both["address"] == site.lab[HEAD].address
    alone = [one for name in ("any", "plain", "5090", "both") for one in seen[name] if RTX_5090.uuid in one["cards"]]
    reserved = [one for name in ("pro", "big", "both") for one in seen[name]]
    assert not overlapping(alone) and not overlapping(reserved), "two tasks never share a card unless they ask to"


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--gpu rtx-4090", "rtx-5090"),
        ("--gpu '>=200GB'", "rtx-pro-6000"),
        ("--gpu rtx-5060-ti --host system-a", "linux-box"),
        ("--gpus 'all on spare'", "spare"),
        ("--gpus 5", "no room for 5 cards"),
        ("--mps", "no Apple GPU"),
        ("--cpus 64", "CPU"),
        ("--host nowhere", "system-a"),
    ],
)
def test_what_no_host_can_give_is_refused_at_once(site: Site, flags: str, told: str) -> None:
    before = len(json.loads(site.workbench("jobs list --json").stdout))
    done = site.workbench(f"submit {flags} -- runs list", check=False, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert told in done.stderr
    assert len(json.loads(site.workbench("jobs list --json").stdout)) == before


def test_a_job_with_a_card_runs_where_the_card_is(site: Site) -> None:
    done = site.workbench("submit --gpu rtx-5060-ti --name with-card --json -- runs list", timeout=200)
    assert json.loads(done.stdout.splitlines()[-1]) == {"job": "with-card", "exit_code": 0}
    row = json.loads(site.workbench("jobs status with-card --json").stdout)
    assert "rtx-5060-ti" in row["resources"] and row["state"] == "SUCCEEDED"


def test_what_must_wait_says_what_for(site: Site) -> None:
    hold = (
        "import ray, time; ray.init(namespace='lab', log_to_driver=False)\n"
        "h = ray.remote(type('H', (), {'here': lambda s: 1})).options(name='holder', lifetime='detached', num_cpus=0, "
        "resources={'rtx-pro-6000': 1}).remote()\nprint(ray.get(h.here.remote(), timeout=60))"
    )
    site.python(HEAD, hold)
    try:
        until(
            lambda: site.status()["hosts"][HEAD]["free"]["rtx-pro-6000"] == 0, 30, "the head's report of what is free"
        )
        done = site.workbench("submit --gpu rtx-pro-6000 --name waits --detach -- runs list")
        assert "rtx-pro-6000" in done.stderr and "wait" in done.stderr
        row = json.loads(site.workbench("jobs status waits --json").stdout)
        assert row["state"] in ("PENDING", "WAITING") and "rtx-pro-6000" in str(row["waits_for"])
        site.workbench("jobs stop waits")
    finally:
        site.python(
            HEAD, "import ray; ray.init(namespace='lab', log_to_driver=False); ray.kill(ray.get_actor('holder'))"
        )


def test_the_head_counts_plain_cards_only(site: Site) -> None:
    totals = {name: host["total"] for name, host in site.status()["hosts"].items()}
    assert {name: total.get("GPU", 0) for name, total in totals.items()} == {HEAD: 1, BOX: 1, SPARE: 0}
    assert totals[HEAD]["rtx-pro-6000"] == totals[HEAD]["rtx-5090"] == totals[BOX]["rtx-5060-ti"] == 1
