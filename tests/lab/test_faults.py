"""A job from the laptop while hosts and links fail: it ends with the right answer or a clear failure, never hangs.

It is plain Ray underneath, so the job here is a plain script, submitted by ``ray job submit`` through the tunnel.
"""

import json
import time

import pytest

from lab.site import BOX, HEAD, SPARE, Site, until

pytestmark = pytest.mark.lab
TASKS, SECONDS = 24, 4.0
RIGHT = f"the sum is {sum(n * n for n in range(TASKS))}"
DETECTED = 10 + 4
"""Seconds in which a fault must be known: the promise, and what asking costs."""
ALL = {HEAD, BOX, SPARE}


class Job:
    """A job of counting, on its way."""

    def __init__(self, site: Site, name: str, driver: str) -> None:
        self.site, self.name = site, f"{name}-{time.time():.0f}"
        session = json.loads(site.lab.laptop.run("cat ~/state/cluster.json").stdout)
        self.variables = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={session['token_file']}"
        self.address = session["dashboard"]
        site.share("counting.py")
        site.lab.laptop.run("mkdir -p ~/job && cp /srv/storage/counting.py ~/job/")
        selector = json.dumps({"workbench.host": driver})
        self.ray(
            f"submit --submission-id {self.name} --no-wait --working-dir job --entrypoint-num-cpus 0.1 "
            f"--entrypoint-label-selector '{selector}' -- python counting.py {self.name} {TASKS} {SECONDS}"
        )

    def ray(self, line: str, *, check: bool = True) -> str:
        """``ray job LINE`` on the laptop; what it printed."""
        verb, _, rest = line.partition(" ")
        script = f"{self.variables} ray job {verb} --address {self.address} {rest}"
        return self.site.lab.laptop.run(script, timeout=120, check=check).stdout

    def starts(self, host: str) -> int:
        """How many tasks have started on ``host``."""
        file = self.site.lab.storage / f"{self.name}.starts"
        lines = file.read_text().splitlines() if file.exists() else []
        return sum(line.split()[1] == host and line.split()[0] != "driver" for line in lines)

    def acknowledged(self) -> dict[int, int]:
        """The results that the job has acknowledged."""
        file = self.site.lab.storage / f"{self.name}.acknowledged"
        lines = file.read_text().splitlines() if file.exists() else []
        return {int(number): int(square) for number, square in map(str.split, lines)}

    def await_work_on(self, host: str) -> None:
        """Wait until tasks run on ``host`` and one result at least is acknowledged."""
        until(lambda: bool(self.starts(host) and self.acknowledged()), 120, f"work on {host}")

    def end(self, seconds: float) -> str:
        """How the job ended. AssertionError if it has not within ``seconds``: it hangs."""
        state = ""

        def ended() -> bool:
            nonlocal state
            done = self.site.workbench(f"jobs status {self.name} --json", check=False, timeout=60)
            state = json.loads(done.stdout)["state"] if done.returncode == 0 else ""
            return state in ("SUCCEEDED", "FAILED", "STOPPED")

        until(ended, seconds, f"the end of {self.name}: {self.starts(HEAD)} {len(self.acknowledged())}", pause=2)
        return state

    def check_answer(self, seconds: float = 180) -> None:
        """The job succeeds with the right sum, every result was acknowledged, and rightly."""
        assert self.end(seconds) == "SUCCEEDED", self.ray(f"logs {self.name}", check=False)
        assert RIGHT in self.site.workbench(f"jobs logs {self.name}").stdout
        assert self.acknowledged() == {n: n * n for n in range(TASKS)}


def gone(site: Site, name: str) -> float:
    """Seconds until the head counts ``name`` out."""
    return until(lambda: name not in site.in_cluster(), 60, f"{name} declared dead", pause=0.1)


def back(site: Site, seconds: float = 150) -> float:
    """Seconds until all hosts are in the cluster again, by themselves."""
    return until(lambda: site.in_cluster() == ALL, seconds, "all hosts in the cluster", pause=1)


def test_a_raylet_is_killed(site: Site) -> None:
    back(site)
    job = Job(site, "raylet", driver=HEAD)
    job.await_work_on(BOX)
    old = site.rays(BOX)
    site.lab[BOX].kill("/raylet/raylet ")
    assert gone(site, BOX) < DETECTED
    job.check_answer()
    back(site)
    assert site.rays(BOX) and site.rays(BOX).isdisjoint(old), "its supervisor started it again"


@pytest.mark.parametrize("seconds", [5, 20, 75])
def test_a_link_is_cut_in_silence(site: Site, seconds: int) -> None:
    back(site)
    job = Job(site, f"cut{seconds}", driver=HEAD)
    job.await_work_on(BOX)
    site.lab.cut(BOX)
    began = time.monotonic()
    try:
        if seconds > DETECTED:
            assert _dead_after(site) < DETECTED
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    finally:
        site.lab.mend(BOX)
    job.check_answer()
    back(site)


def test_the_link_of_a_task_is_cut_for_good(site: Site) -> None:
    """The hang of Ray's defaults: the task on the lost host must be started elsewhere while the link is still cut."""
    back(site)
    job = Job(site, "lost", driver=HEAD)
    job.await_work_on(BOX)
    site.lab.cut(BOX)
    try:
        job.check_answer(seconds=150)
    finally:
        site.lab.mend(BOX)
    back(site)


def test_the_head_is_killed_with_the_driver_elsewhere(site: Site) -> None:
    back(site)
    job = Job(site, "head-away", driver=SPARE)
    job.await_work_on(BOX)
    assert site.lab[HEAD].kill("ray")
    state = job.end(180)
    if state == "SUCCEEDED":
        job.check_answer()
    done = job.acknowledged()
    assert done == {n: n * n for n in done}, "what was acknowledged is right"
    assert state == "SUCCEEDED", "the driver's host was not touched"
    back(site)


def test_the_head_is_killed_with_the_driver_on_it(site: Site) -> None:
    back(site)
    before = Job(site, "before", driver=SPARE)
    job = Job(site, "head-here", driver=HEAD)
    job.await_work_on(BOX)
    following = site.lab.laptop.start(f"workbench jobs logs --follow {job.name}", site.lab.folder / "following.log")
    time.sleep(3)
    assert site.lab[HEAD].kill("ray")
    assert job.end(300) == "FAILED", "the driver died with its host"
    assert following.wait(60) != 0, "who follows the log is told, and not left waiting"
    assert "head-here" in site.workbench("jobs list").stdout
    back(site)
    assert before.end(120) in ("SUCCEEDED", "FAILED")
    after = Job(site, "after", driver=HEAD)
    after.check_answer()


def test_a_detached_actor_outlives_the_head(site: Site) -> None:
    back(site)
    make = (
        "import ray; ray.init(namespace='lab', log_to_driver=False)\n"
        "C = type('C', (), {'__init__': lambda s: setattr(s, 'n', 0), "
        "'add': lambda s: (setattr(s, 'n', s.n + 1), s.n)[1]})\n"
        "c = ray.remote(C).options(name='c', lifetime='detached', num_cpus=0, label_selector={'workbench.host': '%s'})"
        ".remote()\nprint([ray.get(c.add.remote()) for _ in range(3)])"
    )
    assert "[1, 2, 3]" in site.python(BOX, make % BOX)
    site.lab[HEAD].kill("ray")
    until(lambda: not site.in_cluster(), 30, "the head's end")
    back(site)
    look = "import ray; ray.init(namespace='lab', log_to_driver=False); print(ray.get(ray.get_actor('c').add.remote()))"
    assert site.python(BOX, look).split()[-1] == "4"
    site.python(BOX, "import ray; ray.init(namespace='lab', log_to_driver=False); ray.kill(ray.get_actor('c'))")


def _dead_after(site: Site) -> float:
    """Seconds until the control store calls BOX dead, asked on the head itself: the laptop's ssh to BOX would wait."""
    code = (
        "import sys, time, ray; from ray.util.state import list_nodes; began = time.time()\n"
        "while sum(n.state == 'ALIVE' for n in list_nodes()) == 3: time.sleep(0.2)\n"
        "print(time.time() - began)"
    )
    return float(site.python(HEAD, code, timeout=60).split()[-1])
