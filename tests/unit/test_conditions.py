"""Conditions over dotted keys: parsed, checked against what is known, and never run."""

import pytest

from tune.conditions import Condition

VALUES = {"adapter.rank": 16, "adapter.alpha": 32.0, "method": "lora", "packing": True, "targets": ["q", "v"]}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("adapter.alpha >= adapter.rank", True),
        ("adapter.alpha == 2 * adapter.rank and method == 'lora'", True),
        ("not packing or adapter.rank % 3 == 0", False),
        ("method in ['full', 'lora']", True),
        ("'q' not in targets", False),
        ("packing == true", True),
        ("1 < adapter.rank <= 16", True),
        ("-adapter.rank + 20 < 5", True),
    ],
)
def test_a_condition_holds_or_not(text: str, holds: bool) -> None:
    assert Condition.parse(text).holds(VALUES) is holds


def test_it_names_its_keys_once() -> None:
    assert Condition.parse("adapter.rank > 1 and adapter.rank < method").keys == ("adapter.rank", "method")


@pytest.mark.parametrize(
    "text",
    ["adapter.rank >", "__import__('os').system('true')", "x[0] > 1", "(lambda: 1)()", "a if b else c", "2 ** 9 ** 9"],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="condition"):
        Condition.parse(text)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no key 'adapter\.rnk'; did you mean 'adapter\.rank'"):
        Condition.parse("adapter.rnk > 1").check(VALUES)


@pytest.mark.parametrize("text", ["method < 3", "adapter.rank / 0 > 1"])
def test_what_cannot_be_compared_says_what_it_met(text: str) -> None:
    with pytest.raises(ValueError, match=r"with (method='lora'|adapter.rank=16)"):
        Condition.parse(text).holds(VALUES)
