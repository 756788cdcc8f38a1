"""The chunked loss under FSDP2, in two processes."""

import subprocess
import sys
from pathlib import Path

from sharded_loss import CASES

from workbench.config import CHECKOUT


def test_two_sharded_ranks_have_the_loss_and_gradients_of_one_process() -> None:
    script = Path(__file__).parents[1] / "sharded_loss.py"
    done = subprocess.run([sys.executable, str(script)], cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stdout.splitlines() if line in CASES]  # DeepSpeed, which PEFT imports, tells more
    assert told == list(CASES)
