"""Stop Ray on a host and take away what ``cluster up`` started; no other Ray of the host is touched.

The environment, the token, Ray's logs and the shared storage stay. The control store's state goes with the head: a
cluster that is brought up again knows no job of the one that was taken down.
"""

from cluster import firewall
from cluster.dry_run import firewall_command
from cluster.host_state import run_script
from cluster.inventory import Inventory
from cluster.ssh import Remote
from cluster.start_script import shell_path
from cluster.supervisors import SECONDS_TO_STOP, supervisor
from workbench.errors import UserError

STATE = ("start", "ray.env", "running", "started", "failures", "gcs", "gcs.set-aside")


def take_down(inventory: Inventory, name: str) -> str:
    """Take host ``name`` out of the cluster; a note for the person who asked.

    Raises UserError if the host's folder belongs to another cluster, Failure if it cannot be reached.
    """
    host, folder = inventory.hosts[name], shell_path(inventory.hosts[name].folder)
    there = run_script(Remote(host), f"sed -n 's/^WORKBENCH_CLUSTER=//p' {folder}/ray.env 2>/dev/null || true")
    owner = there.stdout.strip()
    if owner and owner != inventory.name:
        raise UserError(f"{name}: {host.folder} belongs to the cluster '{owner}'; nothing was changed there")
    gone = " ".join(f"{folder}/{file}" for file in STATE)
    in_force = firewall.in_force(inventory, name) if host.os == "linux" else "echo no"
    script = f"{supervisor(inventory, name).stop}\nrm -rf {gone}\n{in_force}"
    said = run_script(Remote(host), script, timeout=SECONDS_TO_STOP + 60).stdout.split()
    note = "was not up" if not owner else "Ray is stopped and its service removed"
    if said and said[-1] != "no":
        return f"{note}; the firewall rules go with: {firewall_command(inventory, name)} remove"
    run_script(Remote(host), f"rm -f {folder}/firewall.nft {folder}/firewall.sh")
    return note
