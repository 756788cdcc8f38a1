"""``cluster.yaml``: which machines there are, what is in them, and what they share.

    inventory = read_inventory(Path("cluster.yaml"))

Every command of ``workbench cluster`` reads it; ``cluster init`` writes a first one.
"""

import difflib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from workbench.config import Config, load
from workbench.errors import UserError

DEFAULT_FILE = Path("cluster.yaml")
ADDRESS = r"^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*)$"
"""A name, or an IP address of either kind."""
NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"
GIB = 1 << 30


class PcieLink(Config):
    """The widest link that the slot and the card can make."""

    generation: int = Field(ge=1, le=7, description="PCIe generation")
    width: Literal[1, 2, 4, 8, 16] = Field(description="lanes")


class Card(Config):
    """One NVIDIA card."""

    model: str = Field(pattern=NAME, description="as people say it: rtx-5090, rtx-pro-6000, rtx-5060-ti")
    memory_gb: float = Field(gt=0, le=10_000, description="GB on the box")
    pcie: PcieLink = Field(description="what its slot should give")
    uuid: str = Field(default="", pattern=r"^(GPU-[0-9a-f-]+)?$", description="NVML's; 'init --discover' fills it in")
    reserved: bool | None = Field(
        default=None,
        description="only requests that name the card get it; default: all but the smallest model of a mixed host",
    )

    @field_validator("model")
    @classmethod
    def _no_word_of_ours(cls, model: str) -> str:
        if model in ("any", "all", "cpu", "gpu", "mps"):
            raise ValueError(f"'{model}' means something else in requests: write the card's model")
        return model


class Host(Config):
    """One machine."""

    address: str = Field(pattern=ADDRESS, description="IP address or name that the other hosts reach it by")
    user: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="ssh user")
    ssh_port: int = Field(default=22, ge=1, le=65535, description="ssh port")
    os: Literal["linux", "macos"] = Field(description="operating system")
    python: str = Field(
        default="python3.11", pattern=r"^[A-Za-z0-9_.~/+-]+$", description="interpreter that makes the environment"
    )
    folder: str = Field(default="~/.workbench", description="where 'cluster up' keeps its files on this host")
    environment: str = Field(
        default="", description="an existing virtual environment; empty: 'cluster up' makes FOLDER/env"
    )
    supervisor: Literal["systemd", "launchd", "runit"] | None = Field(
        default=None, description="what keeps Ray running; default: systemd on Linux, launchd on macOS"
    )
    cpus: int | None = Field(default=None, ge=0, description="CPUs to offer; default: all of them")
    object_store_gb: float | None = Field(
        default=None, gt=0, description="shared memory for objects; default: Ray's, a third of the memory"
    )
    cards: list[Card] = Field(default=[], description="its NVIDIA cards, in NVML's order")
    nccl_p2p: bool = Field(
        default=True,
        description="false: its processes get NCCL_P2P_DISABLE=1; 'cluster doctor' says when its cards need it",
    )
    mps: int = Field(default=0, ge=0, le=1, description="1: offer an Apple GPU as the resource 'mps'")
    labels: dict[str, str] = Field(default={}, description="further Ray node labels")

    @field_validator("address")
    @classmethod
    def _is_one(cls, address: str) -> str:
        if ":" in address or re.fullmatch(r"[0-9.]+", address):
            ipaddress.ip_address(address)  # ValueError says what is wrong
        return address

    @model_validator(mode="after")
    def _fits_its_system(self) -> "Host":
        if self.os == "macos" and self.cards:
            raise ValueError("a Mac has no NVIDIA cards: give mps: 1 for its own GPU")
        if self.os == "linux" and self.mps:
            raise ValueError("only a Mac has mps")
        if self.supervisor is not None and (self.supervisor == "launchd") != (self.os == "macos"):
            raise ValueError(f"supervisor {self.supervisor} does not exist on {self.os}")
        plain = sorted({card.model for card in self.cards if not self.is_reserved(card)})
        if len(plain) > 1:
            raise ValueError(f"Ray cannot tell {' and '.join(plain)} apart: give all but one model reserved: true")
        return self

    @property
    def keeper(self) -> Literal["systemd", "launchd", "runit"]:
        """The supervisor, default resolved."""
        return self.supervisor or ("launchd" if self.os == "macos" else "systemd")

    def is_reserved(self, card: Card) -> bool:
        """Whether a plain GPU request must not get ``card``."""
        if card.reserved is not None:
            return card.reserved
        return card.model != min(self.cards, key=lambda one: (one.memory_gb, one.model)).model


class Ports(Config):
    """Ports that the hosts use among each other; all of them are closed to everyone else."""

    gcs: int = Field(default=6379, ge=1024, le=65535, description="the head's control store")
    dashboard: int = Field(default=8265, ge=1024, le=65535, description="dashboard and job API, on the head's loopback")
    client: int = Field(default=10001, ge=1024, le=65535, description="Ray client server on the head")
    node_manager: int = Field(default=6380, ge=1024, le=65535, description="raylet")
    object_manager: int = Field(default=6381, ge=1024, le=65535, description="object transfer")
    agent: int = Field(default=6382, ge=1024, le=65535, description="dashboard agent, HTTP")
    agent_grpc: int = Field(default=6383, ge=1024, le=65535, description="dashboard agent, gRPC")
    runtime_env: int = Field(default=6384, ge=1024, le=65535, description="runtime environment agent")
    metrics: int = Field(default=8090, ge=1024, le=65535, description="Prometheus metrics")
    workers: Annotated[tuple[int, int], Field(description="first and last port of worker processes")] = (20000, 20999)

    @model_validator(mode="after")
    def _distinct(self) -> "Ports":
        first, last = self.workers
        if not 1024 <= first < last <= 65535:
            raise ValueError(f"workers: {first} to {last} is not a range of ports")
        single = {name: getattr(self, name) for name in type(self).model_fields if name != "workers"}
        for name, port in single.items():
            if first <= port <= last:
                raise ValueError(f"{name}: {port} lies among the workers' ports {first} to {last}")
            if other := next((o for o, p in single.items() if p == port and o != name), None):
                raise ValueError(f"{name} and {other} have one port: {port}")
        return self


class Inventory(Config):
    """The whole cluster."""

    name: str = Field(default="home", pattern=NAME, description="names the units and files of this cluster")
    head: str = Field(description="the host that runs the head: the one that is always on")
    hosts: dict[str, Host] = Field(min_length=1, description="name: host")
    storage: str = Field(
        description="shared by all hosts: an absolute path (NFS, mounted alike everywhere) or s3://BUCKET/PREFIX"
    )
    model_cache: str = Field(default="", description="shared Hugging Face cache; default: STORAGE/models")
    token_file: str = Field(default="~/.workbench/token", description="cluster token, 0600, on every host")
    secrets_file: str = Field(
        default="~/.workbench/secrets.env", description="NAME=VALUE lines on every host, 0600; jobs ask for names"
    )
    ports: Ports = Field(default=Ports(), description="what Ray opens; the same on every host")
    keep_sessions_days: int = Field(default=7, ge=1, description="older Ray session folders are deleted at start")
    open_cluster: bool = Field(default=False, description="true: no token authentication at all")

    @field_validator("storage")
    @classmethod
    def _shareable(cls, storage: str) -> str:
        if not re.fullmatch(r"/[^/\n][^\n]*|s3://[A-Za-z0-9][A-Za-z0-9.-]+(/[^\n]*)?", storage):
            raise ValueError("give an absolute path that all hosts mount, or s3://BUCKET/PREFIX")
        return storage.rstrip("/")

    @field_validator("hosts")
    @classmethod
    def _named(cls, hosts: dict[str, Host]) -> dict[str, Host]:
        for name in hosts:
            if not re.match(NAME, name):
                raise ValueError(f"host name '{name}': lower-case letters, digits and hyphens")
        seen: dict[object, str] = {}
        for name, host in hosts.items():
            if (other := seen.setdefault((host.address, host.ssh_port), name)) != name:
                raise ValueError(f"two hosts have one address: {other} and {name}")
            for card in host.cards:
                if card.uuid and (other := seen.setdefault(card.uuid, name)) is not name:
                    raise ValueError(f"two cards have one uuid: {card.uuid}, on {other} and {name}")
        return hosts

    @model_validator(mode="after")
    def _headed(self) -> "Inventory":
        if self.head not in self.hosts:
            near = difflib.get_close_matches(self.head, self.hosts, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"head: '{self.head}' is not among the hosts {', '.join(self.hosts)}{hint}")
        if self.hosts[self.head].os != "linux":
            raise ValueError(f"head: '{self.head}' is a Mac, which sleeps; choose a Linux host")
        return self


def inventory_of(keys: Mapping[str, Any]) -> Inventory:
    """The inventory with these keys. Raises UserError for what is wrong in them."""
    try:
        return Inventory.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def read_inventory(file: Path = DEFAULT_FILE) -> Inventory:
    """The inventory in ``file``. Raises UserError with file and line, and how to make one where there is none."""
    if not file.exists():
        raise UserError(f"no inventory at {file}: 'workbench cluster init' writes one, --inventory FILE names another")
    return load(Inventory, file)
