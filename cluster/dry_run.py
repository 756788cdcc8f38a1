"""``cluster up --dry-run``: every file and every command, host by host, to be read before any host is touched.

Where a home directory is only the host knows: ``~`` and ``$HOME`` stand for it in what is printed, as in the files.
"""

from cluster import environments, firewall
from cluster.inventory import Host, Inventory
from cluster.render import HostFile, without_uuid
from cluster.ssh import Remote
from cluster.supervisors import supervisor

RULE = "=" * 100


def text(inventory: Inventory, files: dict[str, list[HostFile]], *, open_cluster: bool) -> str:
    """The whole answer of a dry run."""
    order = [inventory.head, *(name for name in inventory.hosts if name != inventory.head)]
    parts = [_summary(inventory, open_cluster)]
    for name in order:
        parts.append(_host(inventory, name, files[name], open_cluster))
    return "\n".join(parts)


def firewall_command(inventory: Inventory, name: str) -> str:
    """What a person types once to load the firewall rules of host ``name``."""
    host = inventory.hosts[name]
    port = f" -p {host.ssh_port}" if host.ssh_port != 22 else ""
    root = "" if host.user == "root" else "sudo "
    return f"ssh -t{port} {host.user}@{host.address} {root}sh {host.folder}/firewall.sh"


def _summary(inventory: Inventory, open_cluster: bool) -> str:
    lines = [
        f"The cluster '{inventory.name}': {', '.join(inventory.hosts)}; head {inventory.head}. Nothing was touched.",
        "On each host, head first, 'cluster up' writes the files below if they differ from what is there, and starts",
        "Ray again if one that matters to it was written. What follows '$' is run over ssh as the user named.",
        "No token authentication: whoever reaches a port of Ray runs code on these hosts."
        if open_cluster
        else f"The token is made once, kept below .workbench/ here and in {inventory.token_file} there, mode 600.",
    ]
    for card in without_uuid(inventory):
        lines.append(f"! {card} has no uuid: 'cluster up' refuses until 'cluster init --discover' has filled it in")
    return "\n".join(lines) + "\n"


def _host(inventory: Inventory, name: str, files: list[HostFile], open_cluster: bool) -> str:
    host = inventory.hosts[name]
    keeper = supervisor(inventory, name)
    remote = Remote(host, options=[])
    role = "head" if name == inventory.head else "worker"
    lines = [RULE, f"{name}: {role}, {host.os}, {remote.name()}, supervised by {host.keeper}", RULE, ""]
    lines += _environment(host)
    if not open_cluster:
        lines += [f"--- {inventory.token_file}  (mode 600)  the token, not shown", ""]
    for file in files:
        lines += [f"--- {file.path}  (mode {file.mode:o})", file.content.rstrip(), ""]
    lines += ["--- then, if the service is new or changed"]
    lines += [f"$ {line}" for block in (keeper.enable, keeper.restart) for line in block.splitlines() if line != ":"]
    if host.os == "linux":
        lines += ["", "--- by you, once, as root: loads the firewall rules", f"$ {firewall_command(inventory, name)}"]
        lines += [f"  (taken away again by: sh {host.folder}/firewall.sh remove; table {firewall.table(inventory)})"]
    return "\n".join([*lines, ""])


def _environment(host: Host) -> list[str]:
    folder = environments.environment_folder(host)
    if not environments.is_ours(host):
        return [f"--- environment: {folder}, which is there and is left as it is", ""]
    parent = folder.removesuffix("/.venv")
    return [
        f"--- environment: {folder}, made if it is not there (some minutes, about 5 GB)",
        f"$ mkdir -p {parent} && tar -xzf - -C {parent}      # the files of this checkout that git tracks",
        *(f"$ {line}" for line in environments.install_commands(host).splitlines()),
        "--- and once Ray runs from it, the environments of earlier locks go",
        *(f"$ {line}" for line in environments.remove_others(host).splitlines()),
        "",
    ]
