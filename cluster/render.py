"""What a host of the cluster gets: pure functions from the inventory to files and the ``ray start`` line.

    for file in host_files(inventory, "system-a"):
        print(file.path, file.content)

Nothing here reads a machine. No file holds the token: they say where it is.
"""

import hashlib
import json
from dataclasses import dataclass

from cluster import firewall, supervisors
from cluster.environments import environment_folder
from cluster.health import CONNECTIONS, CONTROL_STORE
from cluster.inventory import GIB, Host, Inventory
from cluster.labels import host_labels, host_resources, plain_cards
from cluster.start_script import shell_path, start_script
from workbench.errors import UserError
from workbench.session import QUIET


@dataclass(frozen=True)
class HostFile:
    """One file on a host; ``path`` may begin with ``~/``. ``restarts``: whether Ray must start again to heed it."""

    path: str
    content: str
    mode: int
    restarts: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def host_files(inventory: Inventory, name: str, *, open_cluster: bool = False) -> list[HostFile]:
    """Every file of host ``name``, in the order in which they are written.

    Raises UserError for a folder that Ray cannot live in.
    """
    host = inventory.hosts[name]
    _check_paths(inventory, name)
    environment = environment_folder(host)
    script = start_script(inventory, name, environment, ray_arguments(inventory, name))
    started_by = supervisors.supervisor(inventory, name)
    variables = host_environment(inventory, name, open_cluster=open_cluster)
    revision = hashlib.sha256(f"{script}{variables}{started_by.definition}".encode()).hexdigest()[:12]
    files = [
        HostFile(f"{host.folder}/start", script, 0o700),
        HostFile(f"{host.folder}/ray.env", _env_text(inventory, variables | {"WORKBENCH_REVISION": revision}), 0o600),
        HostFile(started_by.definition_path, started_by.definition, started_by.mode),
    ]
    if host.os == "linux":
        files += [
            HostFile(f"{host.folder}/firewall.nft", firewall.rules(inventory, name), 0o644, restarts=False),
            HostFile(f"{host.folder}/firewall.sh", firewall.installer(inventory, name), 0o755, restarts=False),
        ]
    return files


def revision(files: list[HostFile]) -> str:
    """What the start script writes down as running once it has started from ``files``."""
    env = next(file.content for file in files if file.path.endswith("/ray.env"))
    return env.rsplit("WORKBENCH_REVISION=", 1)[1].split("\n", 1)[0]


def ray_arguments(inventory: Inventory, name: str) -> list[str]:
    """The arguments of ``ray start`` on host ``name``."""
    host, ports, head = inventory.hosts[name], inventory.ports, inventory.hosts[inventory.head]
    if name == inventory.head:
        role = [
            "--head",
            f"--port={ports.gcs}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports.dashboard}",
            f"--ray-client-server-port={ports.client}",
        ]
    else:
        role = [f"--address={_joined(head.address, ports.gcs)}"]
    labels = ",".join(f"{key}={value}" for key, value in host_labels(name, host).items())
    capacity = [f"--num-cpus={host.cpus}"] if host.cpus is not None else []
    if host.object_store_gb is not None:
        capacity.append(f"--object-store-memory={int(host.object_store_gb * GIB)}")
    resources = {key: _whole(value) for key, value in host_resources(host).items()}
    return [
        "--block",
        *role,
        f"--node-ip-address={host.address}",
        f"--node-name={name}",
        *capacity,
        f"--num-gpus={len(plain_cards(host))}",
        f"--resources={json.dumps(resources)}",
        f"--labels={labels}",
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--metrics-export-port={ports.metrics}",
        f"--min-worker-port={ports.workers[0]}",
        f"--max-worker-port={ports.workers[1]}",
        '--temp-dir="$temp"',
        "--disable-usage-stats",
    ]


def host_environment(inventory: Inventory, name: str, *, open_cluster: bool = False) -> dict[str, str]:
    """The variables of every Ray process on host ``name``, the values written for a POSIX shell."""
    host = inventory.hosts[name]
    variables = {"WORKBENCH_CLUSTER": inventory.name, "WORKBENCH_HOST": name}
    if open_cluster:
        variables["RAY_AUTH_MODE"] = "disabled"
    else:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": shell_path(inventory.token_file)}
    variables |= QUIET | CONNECTIONS
    if name == inventory.head:
        variables |= CONTROL_STORE
        variables |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": shell_path(f"{host.folder}/gcs")}
    if host.cards:
        cards = [card.uuid or str(host.cards.index(card)) for card in plain_cards(host)]
        variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(cards)}
        if not host.nccl_p2p:
            variables["NCCL_P2P_DISABLE"] = "1"
    if host.os == "macos":
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
    if cache := model_cache(inventory):
        variables["HF_HUB_CACHE"] = shell_path(cache)
    variables["WORKBENCH_SECRETS_FILE"] = shell_path(inventory.secrets_file)
    return variables


def model_cache(inventory: Inventory) -> str:
    """The shared cache of models, or nothing where the storage is no file system."""
    if inventory.model_cache:
        return inventory.model_cache
    return f"{inventory.storage}/models" if inventory.storage.startswith("/") else ""


def without_uuid(inventory: Inventory) -> list[str]:
    """The cards, as ``host: model``, that the inventory gives no UUID: nothing could be pinned to them."""
    return [f"{name}: {card.model}" for name, host in inventory.hosts.items() for card in host.cards if not card.uuid]


def _env_text(inventory: Inventory, variables: dict[str, str]) -> str:
    lines = [
        "# Variables of every Ray process on this host; read by ./start. Made by 'workbench cluster up', which",
        "# overwrites changes. It names the token's file and the secrets' file and holds neither.",
        *(f"{key}={value}" for key, value in variables.items()),
    ]
    return "\n".join(lines) + "\n"


def _check_paths(inventory: Inventory, name: str) -> None:
    host: Host = inventory.hosts[name]
    shared = {key: getattr(inventory, key) for key in ("token_file", "secrets_file", "model_cache")}
    paths = {"folder": host.folder, "environment": host.environment, **shared}
    for key, path in paths.items():
        if (key == "folder" and not path.strip("~/")) or (path and not path.startswith(("/", "~/"))):
            raise UserError(f"{name}: {key} '{path}': give an absolute path, or one that begins with ~/")
        if any(letter.isspace() or letter in "\"'\\$`%" for letter in path):
            raise UserError(f"{name}: {key} '{path}': Ray and the supervisors need a path of plain letters, no spaces")


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _whole(amount: float) -> float | int:
    return int(amount) if amount == int(amount) else amount
