"""What became of the trials, as rows: clocks, ports between hosts, the shared storage. Pure functions."""

from collections.abc import Iterator

from cluster.doctor_row import Row, State, gib
from cluster.examination import Clock, Seen
from cluster.inventory import Host, Inventory

CLOCK_WARNING, CLOCK_FAILED = 0.5, 5.0
"""Seconds. Half a second mixes up two hosts' logs; at five, a deadline that one host sets is another's past."""


def check_trials(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """A host on which nothing could be tried."""
    for name, reason in seen.untried.items():
        yield Row(name, "trials", "failed", reason, "an answer", "workbench cluster doctor    (again)")


def check_clocks(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Every clock against the head's, the head's against this machine's."""
    zero = Clock(0, 0)
    for name, clock in seen.clocks.items():
        against = zero if name == inventory.head else seen.clocks.get(inventory.head, zero)
        whose = "this machine" if against is zero else inventory.head
        ahead, uncertainty = clock.ahead - against.ahead, clock.uncertainty + against.uncertainty
        about = f"{abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} {whose}, within {uncertainty:.3f} s"
        beyond = abs(ahead) - uncertainty
        state: State = "ok" if beyond < CLOCK_WARNING else "warning" if beyond < CLOCK_FAILED else "failed"
        if state == "ok":
            yield Row(name, "clock", "ok", about)
            continue
        mac = inventory.hosts[name].os == "macos"
        remedy = "sudo sntp -sS time.apple.com" if mac else "sudo timedatectl set-ntp true; timedatectl timesync-status"
        yield Row(name, "clock", state, about, f"within {CLOCK_WARNING} s", f"on {name}: {remedy}")


def check_ports(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """For each host, whether each other one reaches it on every port that Ray needs."""
    for name, host in inventory.hosts.items():
        if reasons := seen.unbound.get(name):
            reason = "; ".join(sorted(set(reasons.values())))
            yield Row(name, "address", "failed", f"cannot listen at {host.address}: {reason}",
                      "an address of this host", f"on {name}: ip -br address; then hosts.{name}.address")  # fmt: skip
        for source, reached in seen.connections.items():
            if (outcomes := reached.get(name)) is None:
                continue
            blocked = {port: outcome for port, outcome in outcomes.items() if outcome != "open"}
            check = f"ports from {source}"
            if not outcomes:
                continue
            if not blocked:
                yield Row(name, check, "ok", f"{len(outcomes)} ports open")
                continue
            listed = ", ".join(f"{port} {outcome}" for port, outcome in sorted(blocked.items()))
            remedy = _opened(inventory, name, host, inventory.hosts[source], sorted(blocked))
            yield Row(name, check, "failed", listed, f"{len(outcomes)} ports open", remedy)


def check_storage(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether every host can write to the shared storage, and reads what every other one wrote."""
    where = inventory.storage
    for name, reason in seen.writes.items():
        facts = seen.facts[name]
        unread = {writer: why for writer, why in seen.reads.get(name, {}).items() if why}
        if reason:
            told = reason.partition(" (Request")[0]  # an object store adds a number that is of no use here
            yield Row(name, "storage", "failed", f"cannot write to {where}: {told}", "writable",
                      _writable(where, reason, inventory, inventory.hosts[name]))  # fmt: skip
        elif unread:
            told = "; ".join(f"{writer}'s file: {why}" for writer, why in unread.items())
            mount = f"mount the same share at {where} on {name}, {', '.join(unread)} (see: findmnt -T {where})"
            yield Row(name, "storage", "failed", told, "the bytes that each host wrote",
                      mount if where.startswith("/") else f"give all hosts the same endpoint for {where}")  # fmt: skip
        else:
            free = f", {gib(facts.storage.free_bytes)} free" if facts.storage else ""
            yield Row(
                name, "storage", "ok", f"{where}: written, and read back from {len(seen.reads[name])} hosts{free}"
            )


CHECKS = [check_trials, check_clocks, check_ports, check_storage]


def _opened(inventory: Inventory, name: str, host: Host, source: Host, ports: list[int]) -> str:
    if host.os == "macos":
        return f"on {name}: System Settings, Network, Firewall: allow incoming connections of Ray's Python"
    first, last = inventory.ports.workers
    single = [str(port) for port in ports if not first <= port <= last]
    listed = ",".join([*single, f"{first}:{last}"] if len(single) < len(ports) else single)
    return f"on {name}: sudo ufw allow proto tcp from {source.address} to any port {listed}    (or in its own firewall)"


def _writable(where: str, reason: str, inventory: Inventory, host: Host) -> str:
    if where.startswith("s3://"):
        if "NO_SUCH_BUCKET" in reason:
            return f"make the bucket, or correct storage: {where} in the inventory"
        if "pyarrow" in reason:
            return "workbench cluster up    (its environment has pyarrow)"
        return (
            f"put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of one who may write into {inventory.secrets_file} there"
        )
    login = f"ssh -t {'' if host.ssh_port == 22 else f'-p {host.ssh_port} '}{host.user}@{host.address}"
    if "No such file" in reason:
        return f"{login} 'sudo mkdir -p {where} && sudo mount -t nfs SERVER:/EXPORT {where}'    (and into /etc/fstab)"
    if "Permission" in reason:
        return f"{login} sudo mount {where}    (if findmnt {where} shows it mounted: sudo chown {host.user} {where})"
    return f"{login} 'findmnt -T {where}; touch {where}/try'"
