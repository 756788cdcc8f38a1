"""A ``serve up`` with a Ray of its own that is stopped while its engine starts takes all its processes with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from models import make_tiny_llama

from serve import availability

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(availability.available() is not None, reason=str(availability.available())),
]


def tree(pid: int) -> list[psutil.Process]:
    """All descendants of ``pid``."""
    return psutil.Process(pid).children(recursive=True)


def has_engine(processes: list[psutil.Process]) -> bool:
    """Whether vLLM's engine core is among them."""
    for process in processes:
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("VLLM::EngineCore"):
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def test_terminating_serve_up_while_the_engine_starts_leaves_no_process(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "workbench",
        "serve",
        "up",
        f"models=[{{name: m, source: '{model}', device: cpu}}]",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"WORKBENCH_RUNS_ROOT": str(tmp_path / "runs"), "WORKBENCH_STATE": str(tmp_path / "state")}
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen([*command, "port=18431"], env=environment, stderr=errors, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 400
            while not has_engine(before := tree(process.pid)):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
                time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 143
        finally:
            process.kill()
    _, alive = psutil.wait_procs(before, timeout=30)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    [status] = (tmp_path / "runs").glob("serve-up/*/status.json")
    assert json.loads(status.read_text())["state"] == "interrupted"
