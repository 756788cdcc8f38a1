"""A checkout may lie in a folder with a space in its name; Ray may not see it."""

import subprocess
import sys
from pathlib import Path

from workbench.config import CHECKOUT

SCRIPT = str(CHECKOUT / "workbench" / "interpreter.py")


def test_an_environment_in_a_path_with_a_space_is_seen_through_a_link(tmp_path: Path) -> None:
    environment = tmp_path / "with space" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    run = subprocess.run([str(environment / "bin/python"), SCRIPT], capture_output=True, text=True, check=True)
    link = run.stdout.strip()
    assert " " not in link
    prefix = subprocess.run([link, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    assert Path(prefix.stdout.strip()).resolve() == environment.resolve()
    assert " " not in prefix.stdout.strip()
    Path(link).parents[1].unlink()


def test_an_ordinary_path_is_left_as_it_is() -> None:
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == sys.executable
