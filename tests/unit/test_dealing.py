"""Windows of an epoch: what a batch is depends on no row behind its window, and an epoch goes on from any window."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.training import dealing
from workloads.training.dealing import Deal, Epoch, Window

LENGTHS = [1 + (7 * place) % 20 for place in range(200)]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "WINDOW", 3)
    monkeypatch.setattr(dealing, "PACKED_WINDOW", 25)


def windows(count: int, deal: Deal, number: int) -> tuple[list[int], list[Window[int]]]:
    epoch = Epoch(deal, count, number)
    return epoch.order, list(epoch.windows(epoch.order, LENGTHS.__getitem__))


@given(st.integers(0, 200), st.integers(1, 6), st.sampled_from([0, 20, 45]), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_every_row_of_an_epoch_is_dealt_once_but_those_that_fill_no_batch(
    count: int, batch_size: int, capacity: int, number: int
) -> None:
    _, dealt = windows(count, Deal(batch_size, 3, capacity), number)
    sequences = [each for window in dealt for batch in window.batches for each in batch]
    rest = dealt[-1].left if dealt else []
    rows = [row for each in sequences + rest for row in each]
    assert len(rows) == len(set(rows))
    assert len(rows) == count if capacity else len(rows) == count - count % batch_size
    assert len(rest) < batch_size
    assert all(sum(LENGTHS[row] for row in each) <= (capacity or 20) for each in sequences)


@pytest.mark.parametrize("capacity", [0, 40])
def test_a_window_needs_no_row_behind_it_and_an_epoch_goes_on_from_any(capacity: int) -> None:
    deal = Deal(4, 3, capacity)
    order, dealt = windows(200, deal, 1)
    assert len(dealt) > 6
    size = 25 if capacity else 12
    some = Epoch(deal, 200, 1).windows(order[: 3 * size], LENGTHS.__getitem__)
    assert list(some) == dealt[:3]
    again = Epoch(deal, 200, 1).windows(order[3 * size :], LENGTHS.__getitem__, 3, dealt[2].left)
    assert list(again) == dealt[3:]


@given(st.integers(1, 200), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_rows_that_are_left_out_cost_no_batch(count: int, batch_size: int, draw: Random) -> None:
    epoch = Epoch(Deal(batch_size, 3), count, 0)
    usable = [place for place in epoch.order if draw.random() < 0.6]
    batches = [batch for window in epoch.windows(usable, LENGTHS.__getitem__) for batch in window.batches]
    assert len(batches) == len(usable) // batch_size


@pytest.mark.parametrize("capacity", [0, 40])
def test_epochs_and_seeds_differ(capacity: int) -> None:
    first = windows(60, Deal(4, 0, capacity), 0)
    assert first == windows(60, Deal(4, 0, capacity), 0)
    assert first[1] != windows(60, Deal(4, 0, capacity), 1)[1]
    assert first[1] != windows(60, Deal(4, 1, capacity), 0)[1]
