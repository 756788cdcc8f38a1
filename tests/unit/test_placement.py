"""Where a request goes, on made nodes: which resources it asks of Ray, and what is refused or must wait."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_cluster import INVENTORY, RTX_5090, RTX_PRO_6000, card, node, nodes

from cluster.inventory import Host
from cluster.labels import HOST, CardOnHost, read_cards
from cluster.nodes import Node, node_of, parse_usage
from cluster.placement import Placement, lacking, place
from workbench.errors import UserError
from workbench.resources import ResourceRequest


def placed(workers: int = 1, on: list[Node] | None = None, **request: Any) -> Placement:
    return place(ResourceRequest.model_validate(request), nodes() if on is None else on, workers=workers)


def test_a_plain_request_is_a_gpu_and_nothing_else() -> None:
    assert placed(gpu="any").options() == {"num_cpus": 0, "num_gpus": 1}


def test_a_plain_card_by_name_is_a_gpu_of_that_model() -> None:
    assert placed(gpu="rtx-5090", cpu=2).options() == {
        "num_cpus": 2, "num_gpus": 1, "resources": {"rtx-5090": 1}
    }  # fmt: skip


def test_a_reserved_card_is_named_pinned_and_seen_by_its_uuid() -> None:
    placement = placed(gpu="rtx-pro-6000")
    assert (placement.num_gpus, placement.resources) == (0, {"rtx-pro-6000": 1})
    assert placement.label_selector == {HOST: "system-a"}
    assert placement.visible == RTX_PRO_6000


@pytest.mark.parametrize(
    ("memory", "resource"), [(">=12GB", "rtx-5060-ti"), (">=24GB", "rtx-5090"), (">=64GB", "rtx-pro-6000")]
)
def test_a_size_takes_the_smallest_card_that_fits_a_reserved_one_last(memory: str, resource: str) -> None:
    assert set(placed(gpu={"memory": memory}).resources) == {resource}


def test_a_size_takes_a_larger_plain_card_where_the_smallest_is_held() -> None:
    placement = placed(on=nodes(linux_box={"GPU": 1.0}), gpu={"memory": ">=12GB"})
    assert (set(placement.resources), placement.waits) == ({"rtx-5090"}, "")


def test_workers_that_ask_for_a_size_may_take_cards_of_several_models() -> None:
    placement = placed(workers=2, gpu={"memory": ">=12GB"})
    assert (placement.bundle(), placement.label_selector) == ({"GPU": 1}, {HOST: "in(system-a,linux-box)"})


def test_all_on_a_host_is_every_card_and_all_are_seen() -> None:
    placement = placed(gpus="all on system-a")
    assert placement.bundle() == {"GPU": 1, "rtx-5090": 1, "rtx-pro-6000": 1}
    assert placement.visible == f"{RTX_5090},{RTX_PRO_6000}"
    assert placement.label_selector == {HOST: "system-a"}


def test_two_workers_of_all_on_a_host_hold_every_card_between_them() -> None:
    placement = placed(workers=2, gpus="all on system-a")
    assert {name: 2 * amount for name, amount in placement.bundle().items()} == {
        "GPU": 1, "rtx-5090": 1, "rtx-pro-6000": 1
    }  # fmt: skip


def test_an_apple_gpu_is_a_resource_of_the_mac() -> None:
    assert placed(mps=1).options() == {"num_cpus": 0, "num_gpus": 0, "resources": {"mps": 1}}


def test_cpus_on_a_host_are_pinned_there() -> None:
    assert placed(cpu=2, host="linux-box").label_selector == {HOST: "linux-box"}


@pytest.mark.parametrize(
    ("request_", "workers", "said"),
    [
        ({"gpu": "rtx-4090"}, 1, "no host has rtx-4090; the nearest is rtx-5090 (32 GB) on system-a"),
        ({"gpu": {"memory": ">=128GB"}}, 1, "the nearest is rtx-pro-6000 (96 GB) on system-a"),
        ({"gpu": "rtx-pro-6000", "host": "linux-box"}, 1, "rtx-pro-6000 is on system-a"),
        ({"gpu": "rtx-pro-6000"}, 2, "2 workers of rtx-pro-6000 cannot be had at once"),
        ({"gpu": "rtx-pro-6000", "cpu": 20}, 1, "system-a has 16 CPU, 1 rtx-pro-6000"),
        ({"gpu": "any"}, 3, "no room for 3 workers of any card, even when all is idle"),
        ({"gpu": "any", "host": "mac"}, 1, "no plain card on mac"),
        ({"gpus": 2}, 1, "system-a has 16 CPU, 1 GPU"),
        ({"gpus": "all on sistem-a"}, 1, "did you mean system-a?"),
        ({"gpus": "all on mac"}, 1, "'mac' has no named cards"),
        ({"gpus": "all on system-a"}, 3, "give workers=2"),
        ({"mps": 1, "host": "linux-box"}, 1, "mac has one"),
        ({"cpu": 17}, 1, "system-a has 16 CPU; linux-box has 8 CPU; mac has 12 CPU"),
        ({"cpu": 1, "host": "linux-bax"}, 1, "did you mean linux-box?"),
    ],
)
def test_what_no_host_can_ever_give_is_refused_with_the_nearest(
    request_: dict[str, Any], workers: int, said: str
) -> None:
    with pytest.raises(UserError) as error:
        placed(workers=workers, **request_)
    assert said in str(error.value)


def test_what_is_held_is_waited_for_by_name() -> None:
    held = nodes(system_a={"rtx_pro_6000": 1.0})
    assert placed(on=held, gpu="rtx-pro-6000").waits == (
        "waits for rtx-pro-6000: system-a has 0 of 1 rtx-pro-6000 free"
    )
    assert placed(on=held, gpu="any").waits == ""


def test_a_head_without_labels_gives_plain_cards_only() -> None:
    bare = [node_of({}, "somewhere", {"CPU": 4.0, "GPU": 2.0}, None)]
    assert placed(on=bare, gpu="any").num_gpus == 1
    with pytest.raises(UserError, match="2 GPU without a name on somewhere"):
        placed(on=bare, gpu="rtx-5090")


def test_a_host_without_labels_is_pinned_by_rays_id() -> None:
    bare = [node_of({"ray.io/node-id": f"id-{name}"}, name, {"CPU": 4.0}, None) for name in ("one", "two")]
    pinned = placed(on=bare, cpu=1, host="two")
    assert pinned.label_selector == {"ray.io/node-id": "in(id-two)"}
    assert lacking({"CPU": 5.0}, pinned.label_selector, bare) == "no host that is up has it"
    taken = [replace(node, free={"CPU": 0.0}) for node in bare]
    assert lacking({"CPU": 1.0}, pinned.label_selector, taken) == "two has 0 of 4 CPU free"
    labelled = node_of({"workbench.host": "two", "ray.io/node-id": "id"}, "hostname", {"CPU": 4.0}, None)
    assert placed(on=[labelled], cpu=1, host="two").label_selector == {"workbench.host": "two"}


def test_alike_reserved_cards_of_a_host_are_told_apart() -> None:
    cards = [card("a100", 80, "GPU-aa", True), card("a100", 80, "GPU-bb", True), card("t4", 16, "GPU-cc")]
    host = Host(address="x", user="u", os="linux", cpus=8, cards=cards)
    first = placed(on=[node("x", host)], gpu="a100")
    assert first.bundle() == {"a100": 1, f"card-{first.visible}": 1}
    alone = Node("x", "linux", node("x", host).cards, node("x", host).total, {"a100": 1.0, "card-GPU-bb": 1.0})
    assert placed(on=[alone], gpu="a100").visible == "GPU-bb"


def test_a_card_without_a_uuid_is_seen_by_its_place() -> None:
    cards = [card("t4", 16, ""), card("a100", 80, "")]
    host = Host(address="x", user="u", os="linux", cpus=8, cards=cards)
    assert placed(on=[node("x", host)], gpu="a100").visible == "1"


def test_labels_tell_of_every_card_again() -> None:
    for each in nodes():
        assert [one.uuid for one in each.cards] == [one.uuid for one in INVENTORY.hosts[each.host].cards]
    assert read_cards({}) == ()


def test_the_dashboards_text_tells_what_is_free() -> None:
    text = "1.0/4.0 CPU\n0.0/1.0 GPU\n0B/4.00GiB memory\n0.5/1.0 rtx-pro-6000 (0.5 used of 0.5 reserved in groups)"
    assert parse_usage(text) == {"CPU": 3.0, "GPU": 1.0, "rtx-pro-6000": 0.5}


MODELS = {"t4": 16.0, "rtx-5060-ti": 16.0, "rtx-5090": 32.0, "rtx-pro-6000": 96.0}


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    """One to four hosts of any cards, some of them busy."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        models = draw(st.lists(st.sampled_from(sorted(MODELS)), max_size=4))
        cards = [card(model, MODELS[model], f"GPU-{number}{index}") for index, model in enumerate(models)]
        host = Host(address=f"h{number}", user="u", os="linux", cpus=draw(st.integers(1, 16)), cards=cards)
        whole = node(f"h{number}", host)
        busy = {name: draw(st.sampled_from([0.0, amount])) for name, amount in whole.total.items()}
        made.append(Node(whole.host, whole.os, whole.cards, whole.total, busy))
    return made


REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "gpu": st.sampled_from([*MODELS, "any"]) | st.builds(lambda n: {"memory": f">={n}GB"}, st.integers(1, 100)),
        "cpu": st.integers(0, 16),
        "host": st.sampled_from(["h0", "h1"]),
    },
)


def test_a_model_that_is_reserved_elsewhere_is_asked_where_it_is_plain() -> None:
    """There Ray would take the reserved card's resource, and hand out the index of the plain one."""
    mixed = (CardOnHost("rtx-5060-ti", "GPU-0", 16, False), CardOnHost("rtx-pro-6000", "GPU-1", 96, True))
    alone = (CardOnHost("rtx-pro-6000", "GPU-2", 96, False),)
    totals = [
        {"CPU": 8.0, "GPU": 1.0, "rtx-5060-ti": 1.0, "rtx-pro-6000": 1.0},
        {"CPU": 8.0, "GPU": 1.0, "rtx-pro-6000": 1.0},
    ]
    nodes = [
        Node(f"h{n}", "linux", cards, total, None)
        for n, (cards, total) in enumerate(zip((mixed, alone), totals, strict=True))
    ]
    placement = place(ResourceRequest.model_validate({"gpu": "rtx-pro-6000"}), nodes)
    assert (placement.num_gpus, placement.label_selector) == (1, {HOST: "in(h1)"})


@given(clusters(), REQUESTS, st.integers(1, 3))
def test_a_placement_is_on_a_host_that_has_it_and_sees_no_other_card(
    made: list[Node], written: dict[str, Any], workers: int
) -> None:
    request = ResourceRequest.model_validate(written)
    try:
        placement = place(request, made, workers=workers)
    except UserError:
        return
    need = placement.bundle()
    able = [one for one in made if all(one.total.get(name, 0) >= amount for name, amount in need.items())]
    assert able
    by_uuid = {one.uuid: (each.host, one) for each in made for one in each.cards}
    if placement.visible:
        host, seen = by_uuid[placement.visible]
        assert (placement.num_gpus, placement.label_selector, seen.reserved) == (0, {HOST: host}, True)
        assert request.gpu is not None and request.gpu.model in ("", seen.model)
        assert seen.memory_gb >= request.gpu.memory_gb
    elif request.gpu is not None:
        assert placement.num_gpus == 1
        for each in able:  # whichever of its plain cards Ray hands out is one that was asked for
            allowed = placement.label_selector.get(HOST, each.host)
            if each.host in allowed.removeprefix("in(").removesuffix(")").split(","):
                assert all(
                    request.gpu.model in ("", one.model) and one.memory_gb >= request.gpu.memory_gb
                    for one in each.cards
                    if not one.reserved
                )
    if not placement.waits:
        free = sum(
            min((int(each.free.get(n, 0) / a + 1e-6) for n, a in need.items()), default=99)
            for each in able
            if each.free is not None
        )
        assert free >= workers
