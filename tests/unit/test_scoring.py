"""Right, partly right, and how sure."""

import pytest

from workloads.scoring import is_right, paired_difference, partial_credit, wilson


def test_functional_groups_are_right_in_any_order_and_other_answers_only_exactly() -> None:
    assert is_right("groups", "ester, acid", "acid, ester")
    assert not is_right("groups", "ester", "acid, ester")
    assert is_right("formula", "C2H6O", "C2H6O")
    assert not is_right("formula", "C2H6O.", "C2H6O")


def test_partial_credit_is_the_overlap_over_the_union() -> None:
    assert partial_credit("groups", "acid, amine", "acid, ester") == pytest.approx(1 / 3)
    assert partial_credit("rings", "2", "1") == 0
    assert partial_credit("all", "it is two", "it is three or two") == pytest.approx(6 / 8)
    assert partial_credit("all", "", "") == 1


def test_wilson_intervals_are_those_of_the_literature() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_paired_interval_holds_the_difference_and_is_wider_for_few_clusters() -> None:
    a, b = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    each = paired_difference(a, b, [str(i) for i in range(100)], seed=0)
    few = paired_difference(a, b, [str(i // 20) for i in range(100)], seed=0)
    assert each[0] < 0.2 < each[1]
    assert few[1] - few[0] > each[1] - each[0]
    assert paired_difference(a, a, [str(i) for i in range(100)], seed=0) == (0.0, 0.0)
