"""What this checkout knows of a cluster it talks to: the copy of its token, and which inventory is in use.

All of it is below ``.workbench/``, which git ignores.
"""

import hashlib
import os
import secrets
import sys
from pathlib import Path

from cluster.inventory import DEFAULT_FILE, Inventory, read_inventory
from cluster.ssh import Remote
from cluster.start_script import shell_path
from workbench.errors import UserError
from workbench.files import write_atomic
from workbench.session import ClusterAddress, state_folder


def inventory_in_use(given: Path | None) -> tuple[Inventory, Path]:
    """The inventory ``given``, or ``cluster.yaml`` here, or that of the last ``cluster up`` of this checkout, and its
    file. Raises UserError where there is none."""
    if given is None:
        last = state_folder() / "inventory"
        remembered = Path(last.read_text()) if last.exists() else DEFAULT_FILE
        given = remembered if not DEFAULT_FILE.exists() and remembered.exists() else DEFAULT_FILE
    return read_inventory(given), given.resolve()


def remember(file: Path) -> None:
    """Note that this checkout's cluster is the one of inventory ``file``."""
    write_atomic(state_folder() / "inventory", str(file))


def token_copy(inventory: Inventory) -> Path:
    """Where this checkout keeps its copy of the cluster's token."""
    return state_folder() / "clusters" / inventory.name / "token"


def find_token(inventory: Inventory, *, make: bool) -> str:
    """The cluster's token: ours, else the head's, else, with ``make``, a new one; kept in ``token_copy``, 0600.

    With ``make`` the head's goes before ours: somebody may have changed it from another machine since, and who brings
    the cluster up must not bring the old one back.
    Raises UserError where there is none, Failure if the head cannot be reached.
    """
    copy = token_copy(inventory)
    ours = ""
    if copy.exists():
        copy.chmod(0o600)
        ours = copy.read_text().strip()
        if not make:
            return ours
    head = Remote(inventory.hosts[inventory.head])
    token = head.run(f"cat {shell_path(inventory.token_file)} 2>/dev/null", check=False).stdout.strip() or ours
    if ours and token != ours:
        print(f"{inventory.head} has another token than this checkout had: it is taken from there", file=sys.stderr)
    if not token and not make:
        raise UserError(f"the cluster '{inventory.name}' has no token yet: bring it up with 'workbench cluster up'")
    return keep_token(inventory, token or new_token())


def new_token() -> str:
    """A random token."""
    return secrets.token_hex(32)


def keep_token(inventory: Inventory, token: str) -> str:
    """Make ``token`` this checkout's copy; returns it."""
    copy = token_copy(inventory)
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = copy.with_suffix(".new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(token)
    partial.replace(copy)
    return token


def fingerprint(token: str) -> str:
    """What may be shown of a token: the first 16 digits of its SHA-256, as the start script writes them."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def cluster_address(inventory: Inventory, local_port: int, *, open_cluster: bool) -> ClusterAddress:
    """The cluster as reached through a tunnel that ends on ``local_port``."""
    return ClusterAddress(
        gcs="",
        dashboard=f"http://127.0.0.1:{local_port}",
        token_file=None if open_cluster else token_copy(inventory),
        runs_root=Path(inventory.storage) / "runs" if inventory.storage.startswith("/") else None,
        remote=True,
    )
