"""The folder of a Ray ends with its owner, and so does what was started in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from workbench.ray_files import ray_folder

WRITES = "import os, sys, time\nwhile True: os.makedirs(sys.argv[1] + '/logs', exist_ok=True); time.sleep(0.01)"


def test_a_process_that_would_write_to_it_again_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with ray_folder() as folder:
        writer = subprocess.Popen([sys.executable, "-c", WRITES, str(folder)])
    assert writer.wait(10) == -9
    assert not list(tmp_path.iterdir())
    assert other.poll() is None
    other.kill()
    other.wait()
