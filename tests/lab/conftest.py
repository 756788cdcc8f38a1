"""The labs of the tests: one for all that share a cluster, brought up once."""

import os
from collections.abc import Iterator

import pytest

from lab.lab import Lab, missing
from lab.site import HOSTS, Site


@pytest.fixture(scope="session")
def can_lab() -> None:
    """Skip where there can be no lab, and say what is missing."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def site(can_lab: None) -> Iterator[Site]:
    """Three hosts and a laptop with an inventory; the cluster is up.

    With LAB=attach it is the lab of ``python -m lab up``, brought up by hand.
    """
    if os.environ.get("LAB") == "attach":
        yield Site(Lab.attach())
        return
    with Lab.start(HOSTS) as lab:
        site = Site(lab)
        site.discover()
        site.workbench("cluster up --yes")
        with site.dashboard():
            yield site
