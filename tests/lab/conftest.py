"""The labs of the tests: one for all that share a cluster, brought up once."""

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
    """Three hosts and a laptop with an inventory; the cluster is up."""
    with Lab.start(HOSTS) as lab:
        site = Site(lab)
        site.discover()
        site.workbench("cluster up --yes")
        with site.dashboard():
            yield site
