"""Stopping a command: the exit code of the signal, a run marked interrupted, and no process or folder of ours left."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workbench.files import read_json
from workbench.ray_files import remove_abandoned
from workbench.runs import find_runs, state_of

SCRIPT = Path(__file__).resolve().parents[1] / "waiting.py"


class Waiting:
    """The waiting command in a process of its own, its stderr and the processes that it has started."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ}, start_new_session=True,
        )  # fmt: skip
        self.said = ""

    def until(self, text: str) -> None:
        """Wait until the command says ``text``."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if text in line:
                return
        pytest.fail(f"the command ended without saying '{text}': {self.said}")

    def end(self, signum: signal.Signals) -> int:
        """Send ``signum`` and wait; afterwards no process that the command has started may live."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signum)
        assert self.process.stderr is not None
        self.said += self.process.stderr.read()
        code = self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive
        return code


@pytest.fixture(autouse=True)
def _state(runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A runs root and temporary folder of the test's own, where nothing of Ray may be left."""
    temporary = Path(f"/tmp/wbt-{os.getpid()}-{time.monotonic_ns() % 1_000_000}")  # Ray's socket paths must be short
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))  # for this process, which has looked it up before
    yield
    left = [path.name for path in temporary.iterdir()]
    subprocess.run(["rm", "-rf", str(temporary)], check=True)
    assert not [name for name in left if re.match(r"wb-|ray", name)]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda x: str(x)
)
def test_a_command_without_ray_ends_in_order(signum: signal.Signals, code: int) -> None:
    command = Waiting()
    command.until("waiting")
    assert command.end(signum) == code
    [run] = find_runs()
    assert state_of(run) == "interrupted"
    assert "Traceback" not in command.said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=lambda x: str(x))
def test_a_command_that_holds_ray_ends_in_order(signum: signal.Signals, code: int) -> None:
    command = Waiting("--ray")
    command.until("waiting")
    assert command.end(signum) == code
    [run] = find_runs()
    assert state_of(run) == "interrupted"
    assert not (run / "summary.json").exists()
    assert not list(run.rglob("*.partial"))


def test_a_command_that_is_starting_ray_ends_in_order() -> None:
    command = Waiting("--ray")
    command.until("starting a local Ray")
    time.sleep(1.5)
    assert command.end(signal.SIGTERM) == 143
    [run] = find_runs()
    assert state_of(run) == "interrupted"


def test_a_second_signal_leaves_no_process_and_the_run_marked() -> None:
    """While Ray shuts down, SIGTERM kills the command at once: Ray resets its handling."""
    command = Waiting("--ray")
    command.until("waiting")
    command.process.send_signal(signal.SIGTERM)
    until(lambda: state_of(find_runs()[0]) == "interrupted")
    assert command.end(signal.SIGTERM) in (143, -signal.SIGTERM)
    assert state_of(find_runs()[0]) == "interrupted"
    remove_abandoned()


def test_a_failure_is_no_interruption() -> None:
    command = Waiting("--fail", "out of luck")
    command.until("failed: RuntimeError: out of luck")
    assert command.process.wait() == 1
    assert state_of(find_runs()[0]) == "failed"


def test_a_killed_command_is_lost_and_its_ray_goes_with_it() -> None:
    command = Waiting("--ray")
    command.until("waiting")
    family = psutil.Process(command.process.pid).children(recursive=True)
    command.process.kill()
    command.process.wait()
    _, alive = psutil.wait_procs(family, timeout=180)  # they look for their parent now and then
    assert not alive
    [run] = find_runs()
    assert state_of(run) == "lost"
    assert read_json(run / "status.json")["progress"] == "waiting"
    remove_abandoned()  # what the next command does
