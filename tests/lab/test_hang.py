"""Why ``cluster/health.py`` has CONNECTIONS: plain Ray, a task or an actor's call in flight, and the link of its host
cut in silence."""

import pytest

from cluster.health import CONNECTIONS, CONTROL_STORE
from lab.host import Host
from lab.lab import ROOT, Lab
from lab.plain_ray import PlainRay
from lab.site import until

pytestmark = pytest.mark.lab
PATIENCE = 45
DRIVER = """
import os, sys, time, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)

def work(*of):
    with open("/srv/storage/attempts", "a") as file:
        print(os.uname().nodename, file=file)
    time.sleep(15)
    return os.uname().nodename

where = {"num_cpus": 0, "resources": {"slot": 1}}
if sys.argv[1] == "task":
    print("answer", ray.get(ray.remote(work).options(**where, max_retries=3).remote()))
else:
    Worker = ray.remote(type("Worker", (), {"work": work}))
    print("answer", ray.get(Worker.options(**where, max_restarts=3, max_task_retries=3).remote().work.remote()))
"""


@pytest.mark.parametrize(
    ("work", "settings"),
    [("task", {}), ("task", CONNECTIONS), ("actor", CONNECTIONS)],
    ids=["task-defaults", "task-ours", "actor-ours"],
)
def test_work_behind_a_cut_link_is_tried_again_only_with_our_settings(
    can_lab: None, work: str, settings: dict[str, str]
) -> None:
    with Lab.start({"alpha": [], "beta": [], "gamma": []}) as lab:
        cluster = PlainRay(lab, "alpha", {**CONTROL_STORE, **settings})
        cluster.start("alpha")
        lab["alpha"].await_port(6379, 60)
        for name in ("beta", "gamma"):
            cluster.start(name, resources={"slot": 1})
        cluster.await_nodes(3)
        (lab.storage / "driver.py").write_text(DRIVER)
        log = lab.folder / "driver.log"
        lab["alpha"].start(f"{ROOT}/.venv/bin/python /srv/storage/driver.py {work}", log)
        until(lambda: len(attempts(lab)) == 1, 60, "the first attempt")
        lost: Host = lab[attempts(lab)[0]]
        lab.cut(lost.name)
        until(lambda: cluster.alive() == 2, 20, "the node declared dead")
        if settings:
            until(lambda: "answer" in log.read_text(), PATIENCE + 15, "the answer of a second attempt")
            assert len(set(attempts(lab))) == 2
        else:
            # Should Ray itself have mended this, CONNECTIONS can go.
            with pytest.raises(AssertionError, match="not within"):
                until(lambda: len(attempts(lab)) == 2, PATIENCE, "a second attempt")


def attempts(lab: Lab) -> list[str]:
    """The hosts on which the task was started, in order."""
    file = lab.storage / "attempts"
    return file.read_text().split() if file.exists() else []
