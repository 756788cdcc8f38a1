"""Which card a trial gets, on made hosts: the smallest that its estimated memory fits on, and no card too full."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_cluster import RTX_PRO_6000, nodes

from cluster.nodes import Node
from tune.places import DoesNotFit, HostGone, Places, estimated
from workbench.errors import UserError
from workloads.sft import SftConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a model of 1.6 billion parameters, and no weights."""
    from transformers import LlamaConfig

    folder: Path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32}
    LlamaConfig(vocab_size=512, **sizes).save_pretrained(folder)
    return str(folder)


def sft(base: str, resources: Any, **keys: Any) -> SftConfig:
    common = {"base": base, "workers": 1, "strategy": "single", "batch_size": 1, "max_length": 64}
    return SftConfig.model_validate({**common, "resources": resources, "quantization": "none", **keys})


def gib(config: SftConfig) -> float:
    return estimated(config)[0] / 2**30


SIZED = {"gpu": {"memory": ">=12GB"}}


def test_small_trials_take_the_small_card_and_large_ones_the_large(base: str) -> None:
    small, large = sft(base, SIZED), sft(base, SIZED, method="full")
    assert gib(small) < 16 < gib(large) < 32
    places = Places(small, nodes())
    first, second = places.take(0, small), places.take(1, large)
    assert first is not None and second is not None
    assert (first.memory_gb, second.memory_gb) == (16, 32)
    assert set(first.placement.resources) == {"rtx-5060-ti"}


def test_a_trial_waits_where_every_card_that_fits_is_taken_and_gets_the_one_that_is_given_back(base: str) -> None:
    small, large = sft(base, SIZED), sft(base, SIZED, method="full")
    places = Places(small, nodes())
    taken = [places.take(number, large) for number in range(2)]
    assert [place.memory_gb for place in taken if place] == [32, 96]
    assert taken[1] is not None and taken[1].placement.visible == RTX_PRO_6000
    assert places.take(2, large) is None
    assert places.take(3, small) is not None
    places.give_back(0)
    again = places.take(2, large)
    assert again is not None and again.memory_gb == 32


def test_a_trial_that_ran_out_of_memory_gets_a_larger_card_or_none(base: str) -> None:
    small = sft(base, SIZED)
    places = Places(small, nodes())
    place = places.take(0, small, over_gb=16)
    assert place is not None and place.memory_gb == 32
    with pytest.raises(DoesNotFit, match="more than 96 GB, which it had"):
        places.take(1, small, over_gb=96)


def test_cards_of_a_host_that_is_gone_are_waited_for_and_found_when_it_is_back(base: str) -> None:
    small, large = sft(base, SIZED), sft(base, SIZED, method="full")
    places = Places(small, nodes())
    assert [place.memory_gb for number in range(2) if (place := places.take(number, small))] == [16, 32]
    places.refresh([node for node in nodes() if node.host != "system-a"])
    assert (places.is_gone(0), places.is_gone(1)) == (False, True)
    with pytest.raises(HostGone, match="no host that is up has rtx-5090 or rtx-pro-6000"):
        places.take(2, large)
    assert not places.has_room()
    places.give_back(1)
    places.refresh(nodes())
    assert [place.memory_gb for number in (1, 2) if (place := places.take(number, large))] == [32, 96]
    with pytest.raises(UserError, match="no host has"):
        places.refresh(nodes()[2:])


def test_cards_that_others_had_at_first_stay_theirs_and_new_ones_are_added(base: str) -> None:
    half = sft(base, {"gpu": "rtx-5090", "share": 0.5})

    def with_cards(count: float) -> Node:
        more = {"rtx-5090": count, "GPU": count}
        return replace(nodes()[0], total={**nodes()[0].total, **more}, free={**nodes()[0].total, "rtx-5090": 1.0})

    places = Places(half, [with_cards(2)])
    assert [places.take(number, half) is not None for number in range(3)] == [True, True, False]
    places.refresh([with_cards(2)])  # says the same: trials that have not begun hold nothing
    assert places.take(2, half) is None
    places.refresh([with_cards(3)])
    assert [places.take(number, half) is not None for number in range(2, 5)] == [True, True, False]


def test_no_card_is_large_enough(base: str) -> None:
    big = sft(base, {"gpu": "rtx-5060-ti"}, method="full")
    places, words = Places(big, nodes()), r"GiB \(estimated\), and the largest card that it may get has 16 GB"
    with pytest.raises(DoesNotFit, match=words):
        places.take(0, big)
    with pytest.raises(UserError, match="of the first 2 trials none fits"):
        places.check([big, big], nodes(), pytest.fail)
    places.check([big, sft(base, SIZED)], nodes(), pytest.fail)


def test_a_share_is_as_large_as_the_trial_needs(base: str) -> None:
    shared = sft(base, {"gpu": "rtx-5090", "share": 0.05})
    places = Places(shared, nodes())
    given = []
    while (place := places.take(len(given), shared)) is not None:
        given.append(place)
    assert len(given) == int(1 / given[0].share)
    assert given[0].share * 32 >= gib(shared)
    assert given[0].placement.num_gpus == pytest.approx(given[0].share)


def test_any_card_is_no_reserved_one_and_a_cpu_has_no_size(base: str) -> None:
    plain = sft(base, {"gpu": "any"}, method="full")
    places = Places(plain, nodes())
    first = places.take(0, plain)
    assert first is not None and first.memory_gb == 32
    assert places.take(1, plain) is None
    cpu = sft(base, {"cpu": 1})
    on_cpu = Places(cpu, nodes()).take(0, cpu)
    assert on_cpu is not None and (on_cpu.memory_gb, on_cpu.placement.bundle()) == (0, {"CPU": 1.0})


def test_what_no_host_has_is_refused_at_once(base: str) -> None:
    with pytest.raises(UserError, match="no host has"):
        Places(sft(base, {"gpu": "rtx-4090"}), nodes())
