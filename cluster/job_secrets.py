"""Secrets of a job: named by whoever submits it, read on each host from a file that only its owner can read.

    HF_TOKEN=hf_...            # ~/.workbench/secrets.env, mode 0600, on every host
    workbench submit --secret HF_TOKEN -- train sft configs/train/qlora_8b_two_cards.yaml

A value goes from the file into the environment of the job's processes on that host, and nowhere else: the runtime
environment, the job's metadata and its log have names alone.
"""

import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from workbench.config import adopt_environment, environment
from workbench.errors import UserError

FILE_VARIABLE = "WORKBENCH_SECRETS_FILE"
NAMES_VARIABLE = "WORKBENCH_SECRETS"
DEFAULT_FILE = "~/.workbench/secrets.env"
HOOK = "cluster.job_secrets.adopt_in_worker"
"""Ray calls it in each worker of a job that named secrets, before the worker's first task."""


def secret_names() -> list[str]:
    """The secrets that this job asked for."""
    return [name for name in (environment(NAMES_VARIABLE) or "").split(",") if name]


def read_secrets(file: Path) -> dict[str, str]:
    """The pairs of a file of NAME=VALUE lines; ``#`` begins a comment line, quotes around a value are left out.

    Raises UserError if there is no such file, others can read it, or a line is no pair; never with a value in it.
    """
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file} on {socket.gethostname()} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"{file} on {socket.gethostname()} can be read by others: chmod 600 {file}")
    pairs = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UserError(f"{file}:{number} on {socket.gethostname()}: write NAME=VALUE")
        value = value.strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        pairs[name.strip()] = value[1:-1] if quoted else value
    return pairs


def adopt(names: Sequence[str]) -> None:
    """Put the secrets of these names into this process's environment.

    Raises UserError for a name that the host's file lacks.
    """
    file = Path(environment(FILE_VARIABLE) or DEFAULT_FILE).expanduser()
    pairs = read_secrets(file)
    if lacking := [name for name in names if name not in pairs]:
        raise UserError(f"{file} on {socket.gethostname()} has no {', '.join(lacking)}: add NAME=VALUE lines to it")
    adopt_environment({name: pairs[name] for name in names})


def adopt_in_worker() -> None:
    """``adopt`` what the job named. A host that lacks it says so in the worker's log: a worker that raised here would
    be started again for ever."""
    try:
        adopt(secret_names())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
