"""Requests in a person's terms: what they mean, and what is said of a mistake."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.config import load
from workbench.errors import UserError
from workbench.resources import Placed, ResourceRequest, plain_request


class Work(Placed):
    """A command whose workers may take several cards."""

    several = True

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


@pytest.mark.parametrize(
    ("text", "device", "gpus", "said"),
    [
        ("cpu only", "cpu", 0, "1 CPU"),
        ("{cpu: 2}", "cpu", 0, "2 CPU"),
        ("{gpu: rtx-pro-6000}", "cuda", 1, "rtx-pro-6000 and 1 CPU"),
        ("{gpu: {memory: '>=24GB'}}", "cuda", 1, "any card with >=24GB and 1 CPU"),
        ("{gpu: any, share: 0.5}", "cuda", 0.5, "0.5 of any card and 1 CPU"),
        ("{gpus: all on system-a}", "cuda", 1, "all cards on system-a and 1 CPU"),
        ("{mps: 1}", "mps", 0, "an Apple GPU and 1 CPU"),
        ("{cpu: 2, host: linux-box}", "cpu", 0, "2 CPU on linux-box"),
    ],
)
def test_a_request_sets_the_amounts_and_says_what_it_is(text: str, device: str, gpus: float, said: str) -> None:
    config = load(Work, None, [f"resources={text}"])
    request = config.request()
    assert (request.device, config.gpus_per_worker, str(request)) == (device, gpus, said)
    assert Work.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{gpu: RTX 5090}", "did you mean rtx-5090?"),
        ("{gpu: 5090}", "say which card"),
        ("{gpu: {memory: 24}}", 'write ">=24GB"'),
        ("{gpu: {memory: 24GB}}", 'write ">=24GB"'),
        ("{gpus: all}", "write 'all on HOST'"),
        ("{gpus: 1.5}", "write 'all on HOST'"),
        ("{gpuu: any}", "did you mean 'resources.gpu'?"),
        ("{gpu: any, mps: 1}", "cannot be had together"),
        ("{share: 0.5}", "give gpu too"),
        ("{gpu: any, share: 1.5}", "less than 1"),
        ("{gpus: all on a, host: b}", "name two hosts"),
        ("{cpu: only}", "write 'resources: cpu only'"),
        ("gpu", "is no request"),
        ("{mps: 2}", "0 or 1"),
    ],
)
def test_a_mistake_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(UserError, match="resources=") as error:
        load(Work, None, [f"resources={text}"])
    assert message in str(error.value)


def test_an_amount_that_contradicts_the_request_is_refused() -> None:
    with pytest.raises(UserError, match=r"gpus_per_worker 0\.5 contradicts"):
        load(Work, None, ["resources={gpu: any}", "gpus_per_worker=0.5"])
    assert load(Work, None, ["resources={gpu: any}", "gpus_per_worker=1"]).gpus_per_worker == 1


def test_without_resources_the_amounts_are_the_request() -> None:
    assert load(Work).request() == ResourceRequest(cpu=1)
    assert load(Work, None, ["gpus_per_worker=0.5"]).request() == plain_request(1, 0.5)
    assert plain_request(1, 2).gpus == 2
    with pytest.raises(UserError, match=r"1\.5 cards"):
        plain_request(1, 1.5)


class OneCard(Placed):
    """A command whose workers take one card each."""

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


class Reading(Placed):
    """A command without any."""

    amounts = ("cpus_per_task", "")
    cpus_per_task: float = 1.0


def test_a_command_refuses_cards_that_it_would_leave_idle() -> None:
    with pytest.raises(UserError, match="takes one card"):
        load(OneCard, None, ["resources={gpus: all on system-a}"])
    with pytest.raises(UserError, match="computes on CPUs"):
        load(Reading, None, ["resources={gpu: any}"])
    assert load(Reading, None, ["resources={cpu: 2, host: linux-box}"]).cpus_per_task == 2


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["gpu", "gpus", "mps", "cpu", "share", "host"]), inner)
        ),
    )
)
def test_whatever_is_written_is_a_request_or_a_user_error(value: Any) -> None:
    """No YAML value ends in another exception, and what is taken can be written down and read again."""
    try:
        config = Work.model_validate({"resources": value})
    except ValueError:
        return
    assert Work.model_validate(config.model_dump(mode="json")) == config
