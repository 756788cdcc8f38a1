"""What is asked of Ray for a job: entrypoint, runtime environment, metadata and resources; also as a plain Ray line.

The metadata, the entrypoint and the runtime environment can be read by everyone who can read the cluster, so nothing
that looks like a secret gets into them: it is refused with the way that does.
"""

import getpass
import json
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.job_secrets import HOOK, NAMES_VARIABLE
from cluster.placement import Placement
from cluster.upload import EXCLUDES
from workbench.config import CHECKOUT, CLEAN_VARIABLE, COMMIT_VARIABLE, RUNS_ROOT_VARIABLE
from workbench.errors import UserError
from workbench.redact import MASK, SECRET_KEY, redact_argument
from workbench.runs import git_commit

COMMAND = ["python", "-m", "workbench"]
ENTRY = ["python", "-m", "cluster.job_entry"]
HOLD = ["python", "-m", "cluster.job_hold"]
EXEC = "exec "
"""The shell gives way to the command: where the job's supervisor dies, Ray kills its own children and no further."""
HOLD_VARIABLE = "WORKBENCH_HELD_JOB"
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
URL_PASSWORD = re.compile(r"(://[^/:\s]*):(?!\d+(?:[/?#]|$))\S*@")
"""To the last @ of the word, for people put @ and / into passwords as they are; ``://host:8000/a@b`` is a port."""


@dataclass(frozen=True)
class EntrypointResources:
    """What the job's own process reserves; the workers it starts ask for theirs. ``cards`` are UUIDs it shall see."""

    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    custom: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    cards: str = ""
    text: str = ""

    @classmethod
    def of(cls, placement: Placement, memory: int, custom: Mapping[str, float], text: str) -> "EntrypointResources":
        """What ``placement`` asks for, for the job's own process."""
        return cls(
            placement.num_cpus, placement.num_gpus, memory, {**placement.resources, **custom},
            placement.label_selector, placement.visible, text,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """As Ray's job API takes them; what is not asked for is left out."""
        asked = {
            "entrypoint_num_cpus": self.cpus, "entrypoint_num_gpus": self.gpus, "entrypoint_memory": self.memory,
            "entrypoint_resources": self.custom, "entrypoint_label_selector": self.label_selector,
        }  # fmt: skip
        return {name: value for name, value in asked.items() if value}

    def asks(self) -> dict[str, Any]:
        """The bundle and the labels, for whoever wants to know what a pending job waits for."""
        bundle = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory), **self.custom}
        return {"bundle": {name: n for name, n in bundle.items() if n}, "label_selector": self.label_selector}

    def __str__(self) -> str:
        if self.text:
            return self.text
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)


@dataclass(frozen=True)
class JobSpec:
    """A job as it is submitted: ``command`` is what follows ``workbench``."""

    command: list[str]
    runs_root: Path
    resources: EntrypointResources = EntrypointResources()
    variables: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    retries: int = 0
    workers: str = ""
    cards: float = 0.0

    def __post_init__(self) -> None:
        refuse_secrets(self.command, self.variables)
        for secret in self.secrets:
            if not SECRET_NAME.fullmatch(secret):
                shown = secret.partition("=")[0]
                raise UserError(f"--secret {shown or repr(secret)}...: give the NAME of a secret, not its value")
        for job in self.after:
            if not job:
                raise UserError("--after: give the id of a job; 'workbench jobs list' has them")
            check_name(job)
        if self.retries < 0:
            raise UserError(f"--retries {self.retries}: give 0 or more")

    @property
    def held(self) -> bool:
        """Whether a supervisor on the cluster starts the command, after other jobs or once more."""
        return bool(self.after or self.retries)

    def entrypoint(self) -> str:
        """The command line of the job's process."""
        if self.held:
            return EXEC + shlex.join([*HOLD, "--", *self.command])
        return self.command_line()

    def command_line(self) -> str:
        """The command line of an attempt."""
        options = [argument for name in self.secrets for argument in ("--secret", name)]
        if self.resources.cards:
            options += ["--cards", self.resources.cards]
        return EXEC + shlex.join([*ENTRY, *options, "--", *self.command] if options else [*COMMAND, *self.command])

    def runtime_env(self) -> dict[str, Any]:
        """This checkout and the variables; of secrets their names, and the hook that resolves them in workers."""
        commit, clean = git_commit(CHECKOUT)
        variables = {
            RUNS_ROOT_VARIABLE: str(self.runs_root),
            COMMIT_VARIABLE: commit or "unknown",
            CLEAN_VARIABLE: "1" if clean else "0",
            **self.variables,
        }
        env: dict[str, Any] = {"working_dir": str(CHECKOUT), "excludes": EXCLUDES, "env_vars": variables}
        if self.secrets:
            variables[NAMES_VARIABLE] = ",".join(self.secrets)
            env["worker_process_setup_hook"] = HOOK
        if self.held:
            variables[HOLD_VARIABLE] = json.dumps(self.attempt(env))
        return env

    def attempt(self, env: Mapping[str, Any]) -> dict[str, Any]:
        """What the supervisor needs to submit the command: all but the working directory, which it has itself."""
        kept = {key: value for key, value in env.items() if key not in ("working_dir", "excludes")}
        return {
            "after": self.after, "retries": self.retries, "entrypoint": self.command_line(),
            "runtime_env": {**kept, "env_vars": dict(env["env_vars"])}, "metadata": self.metadata(),
            "arguments": self.resources.arguments(),
        }  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """What lists of jobs show."""
        shown = {
            "command": shlex.join(self.command),
            "owner": f"{getpass.getuser()}@{socket.gethostname()}",
            "resources": ", ".join(filter(None, [str(self.resources), self.workers])),
            "after": ", ".join(self.after),
            "retries": str(self.retries or ""),
            "secrets": ", ".join(self.secrets),
            "cards": f"{self.cards or self.resources.gpus:g}" if self.cards or self.resources.gpus else "",
            "asks": json.dumps(self.resources.asks()) if self.resources.arguments() else "",
        }
        return {key: value for key, value in shown.items() if value}

    def arguments(self) -> dict[str, Any]:
        """All of it as Ray's ``submit_job`` takes it. A supervisor itself reserves nothing while it waits."""
        asked = {} if self.held else self.resources.arguments()
        return {
            "entrypoint": self.entrypoint(), "runtime_env": self.runtime_env(), "metadata": self.metadata(), **asked
        }  # fmt: skip

    def plain_line(self, address: str, name: str) -> str:
        """The same with Ray alone: a line to type in this checkout."""
        env = self.runtime_env()
        env.pop("working_dir")
        options = ["--address", address, "--working-dir", ".", "--runtime-env-json", json.dumps(env)]
        if name:
            options += ["--submission-id", name]
        asked = {} if self.held else self.resources.arguments()
        for key, value in asked.items():
            options += [f"--{key.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else _plain(value)]
        return f"{shlex.join(['ray', 'job', 'submit', *options])} -- {self.entrypoint()}"


def _plain(amount: float) -> str:
    return str(int(amount)) if amount == int(amount) else str(amount)


def check_name(name: str) -> None:
    """Raise UserError for a job's name that cannot be part of a file's name and of a URL, as Ray has it."""
    if name and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', at most 100, a letter or digit first")


def hidden(argument: str) -> str:
    """The argument with what looks like a secret masked, also in a URL whose password has an @ or a / in it."""
    return redact_argument(URL_PASSWORD.sub(rf"\1:{MASK}@", argument))


def hidden_line(line: str) -> str:
    """A command line with what looks like a secret masked, for jobs that were not submitted by us."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    return line if all(hidden(word) == word for word in words) else shlex.join(map(hidden, words))


def refuse_secrets(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Raise UserError for an argument or a variable that looks like a secret: everyone could read it."""
    how = "put it into the hosts' secrets file and name it: --secret NAME"
    for argument in command:
        if hidden(argument) != argument:
            raise UserError(f"{hidden(argument)} would be written to the job's metadata; {how}")
    for name, value in variables.items():
        if value and (SECRET_KEY.search(name) or hidden(value) != value):
            raise UserError(f"--env {name}=... would be written to the job's runtime environment; {how}")
