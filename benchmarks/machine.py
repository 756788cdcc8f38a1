"""What a figure was measured on, and where figures are written down."""

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from workbench.config import CHECKOUT


def processor() -> str:
    """The model of the CPU as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """CPU, cores, memory and system in a line."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}"


def commit() -> str:
    """The short commit of this checkout, with a + where files differ from it."""
    git = ["git", "-C", str(CHECKOUT)]
    short = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    return f"{short.stdout.strip() or 'unknown'}{'+' if changed else ''}"


def heading(title: str, packages: Sequence[str]) -> str:
    """A Markdown heading and a line with the date, the machine, the commit and the versions of ``packages``."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    today = datetime.datetime.now(datetime.UTC).date()
    return f"## {title}\n\n{today}, {machine()}; commit {commit()}, Python {platform.python_version()}, {versions}.\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that have the keys of the first."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_down(text: str, file: Path | None) -> None:
    """Print, and append to ``file`` where one is given."""
    print(text, flush=True)
    if file:
        with file.open("a") as stream:
            stream.write(f"\n{text}")
