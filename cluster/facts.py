"""What the hosts of a cluster are, as ``probe.py`` tells it, with types.

    facts = read_facts(Remote(host), asked_of(inventory, host, salt))

None means that a host does not have it or would not say; ``missing`` then has the reason.
"""

from typing import Any

from pydantic import Field

from cluster.environments import environment_folder
from cluster.inventory import Host, Inventory
from cluster.remote_python import PROBE, run_script
from cluster.ssh import Remote
from workbench.config import Config


class System(Config):
    """Operating system and sizes; bytes."""

    os: str
    name: str | None = None
    release: str = ""
    arch: str = ""
    hostname: str = ""
    user: str | None = None
    cpus: int | None = None
    chip: str | None = None
    memory_bytes: int | None = None
    available_bytes: int | None = None
    shm_bytes: int | None = None


class Interpreter(Config):
    """A Python that is on the host; the version to the patch."""

    path: str
    version: str


class Environment(Config):
    """The virtual environment that the host's Ray runs in."""

    path: str
    python: str
    packages: dict[str, str]
    torch_cuda: str | None = None


class CardFacts(Config):
    """One card by NVML; ``generation`` falls when it is idle."""

    index: int
    name: str
    uuid: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    generation: int | None = None
    generation_max: int | None = None
    width: int | None = None
    width_max: int | None = None
    processes: int | None = None


class Nvidia(Config):
    """Driver and cards; ``peers`` says for "0->1" whether the driver lets card 0 read card 1."""

    driver: str | None = None
    cuda: str | None = None
    cards: list[CardFacts] = Field(default=[])
    peers: dict[str, bool] | None = None


class Disk(Config):
    """The file system of a folder; whether the folder itself is there."""

    exists: bool
    total_bytes: int
    free_bytes: int


class SecretFile(Config):
    """A file that only its owner should read; ``digest`` is salted and differs from run to run."""

    exists: bool
    mode: str = ""
    owned: bool = True
    digest: str | None = None


class Listener(Config):
    """A port that is taken; the program is ``ray`` for all of Ray's, None for another user's."""

    port: int
    address: str
    program: str | None = None


class Raylet(Config):
    """A running Ray process and the authentication that it was started with."""

    pid: int
    auth_mode: str


class Mac(Config):
    """``sleep_minutes`` 0 means never; ``firewall`` is off, on or blocks all."""

    sleep_minutes: int | None = None
    firewall: str | None = None


class Systemd(Config):
    """Whether systemd is the init, and whether this user's units outlive the login."""

    running: bool
    lingers: bool


class Facts(Config):
    """All facts of one host."""

    system: System
    pythons: dict[str, Interpreter] = Field(default={})
    environment: Environment | None = None
    nvidia: Nvidia | None = None
    folder: Disk | None = None
    storage: Disk | None = None
    token_file: SecretFile | None = None
    secrets_file: SecretFile | None = None
    listening: list[Listener] | None = None
    raylets: list[Raylet] | None = None
    ray_variables: dict[str, str] | None = None
    shared_mounts: list[str] | None = None
    macos: Mac | None = None
    systemd: Systemd | None = None
    epoch: float = 0
    missing: dict[str, str] = Field(default={})


def asked_of(inventory: Inventory, host: Host, salt: str) -> dict[str, Any]:
    """What the probe must know to look in the right places of ``host``."""
    ports = inventory.ports
    return {
        "environment": environment_folder(host),
        "interpreter": host.python,
        "folder": host.folder,
        "storage": inventory.storage,
        "token_file": inventory.token_file,
        "secrets_file": inventory.secrets_file,
        "salt": salt,
        "ports": [getattr(ports, name) for name in type(ports).model_fields if name != "workers"],
    }


def read_facts(remote: Remote, asked: dict[str, Any]) -> Facts:
    """Probe the host. Raises Failure if it cannot be reached or has no Python."""
    return Facts.model_validate(run_script(remote, PROBE, asked))
