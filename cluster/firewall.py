"""Rules for a Linux host's firewall: Ray's ports answer the hosts of the inventory and the host itself, nobody else.

Ray binds several ports to all interfaces and two of them ask for no token (metrics, and the monitor's): only a
firewall closes those. It takes root, so ``cluster up`` writes the rules and prints the one command that loads them.
"""

import ipaddress
import socket

from cluster.inventory import Inventory
from workbench.errors import UserError

RAY_FIXED = (44217, 44227)
"""Metrics of Ray's monitor and of its dashboard process; no option of ``ray start`` moves them."""

CLIENT_SERVERS = (23000, 24000)
"""What serves one client of ``ray://`` each, on the head."""

EPHEMERAL = (32768, 60999)
"""Where Linux opens a port when a program names none, as torch's rendezvous and vLLM's workers do, unguarded."""

RULES = """#!/usr/sbin/nft -f
# Ray's ports on {host}, of the cluster '{cluster}'. Made by 'workbench cluster up'; './firewall.sh' loads it (root).
# Whoever is not in the cluster reaches none of them; everything else on this host is left as it is.
table inet {table}
delete table inet {table}

table inet {table} {{
    set ray_ports {{
        type inet_service
        flags interval
        elements = {{ {ports} }}
    }}
    chain input {{
        type filter hook input priority filter - 5; policy accept;
        iif lo accept
        ct state established,related accept
        tcp dport {ssh} accept
{members}
        tcp dport @ray_ports counter drop
    }}
}}
"""

INSTALLER = """#!/bin/sh
# Loads the firewall rules beside this script, now and at every boot: sudo sh firewall.sh
# Takes them away again: sudo sh firewall.sh remove. Made by 'workbench cluster up'.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
rules=/etc/workbench/{table}.nft
unit=/etc/systemd/system/{unit}
[ "$(id -u)" = 0 ] || {{ echo "run it as root: sudo sh $here/firewall.sh" >&2; exit 1; }}
if [ "${{1:-}}" = remove ]; then
    if [ -f "$unit" ]; then systemctl disable --now {unit} || true; fi
    nft delete table inet {table} 2>/dev/null || true
    rm -f "$rules" "$unit"
    exit
fi
command -v nft >/dev/null || {{ echo "no nft on this host: install nftables" >&2; exit 1; }}
nft --check -f "$here/firewall.nft"
install -D -m 644 "$here/firewall.nft" "$rules"
if [ -d /run/systemd/system ]; then
    cat >"$unit" <<'END'
[Unit]
Description=Ray's ports answer the cluster '{cluster}' only
Before=network-pre.target
Wants=network-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/nft -f {etc_rules}
ExecReload=/usr/sbin/nft -f {etc_rules}
ExecStop=/usr/sbin/nft delete table inet {table}

[Install]
WantedBy=multi-user.target
END
    systemctl daemon-reload
    systemctl enable {unit}
    systemctl restart {unit}
else
    nft -f "$rules"
fi
echo "in force: nft list table inet {table}"
"""


def table(inventory: Inventory) -> str:
    """The name of the cluster's table of rules."""
    return f"workbench_{inventory.name.replace('-', '_')}"


def rules(inventory: Inventory, name: str) -> str:
    """The rules of host ``name``, for ``nft -f``; loading them twice is the same as once."""
    others = [host.address for other, host in inventory.hosts.items() if other != name]
    return RULES.format(
        host=name,
        cluster=inventory.name,
        table=table(inventory),
        ssh=inventory.hosts[name].ssh_port,
        ports=", ".join(_range(*ports) for ports in closed_ports(inventory, name)),
        members="\n".join(
            f"        {'ip6' if ':' in number else 'ip'} saddr {number} accept"
            for address in others
            for number in numbers_of(address)
        )
        or "        # no other host",
    )


def installer(inventory: Inventory, name: str) -> str:
    """The script that loads the rules of host ``name`` now and at boot."""
    return INSTALLER.format(
        table=table(inventory), unit=unit(inventory), cluster=inventory.name, etc_rules=etc_rules(inventory)
    )


def in_force(inventory: Inventory, name: str) -> str:
    """A shell expression that prints ``yes``, ``no`` or ``old`` (other rules than ours are loaded)."""
    host = inventory.hosts[name]
    from cluster.start_script import shell_path

    return (
        f"if ! {{ systemctl is-active --quiet {unit(inventory)} 2>/dev/null || "
        f"nft list table inet {table(inventory)} >/dev/null 2>&1; }}; then echo no; "
        f"elif cmp -s {etc_rules(inventory)} {shell_path(host.folder)}/firewall.nft; then echo yes; else echo old; fi"
    )


def closed_ports(inventory: Inventory, name: str) -> list[tuple[int, int]]:
    """First and last port of what Ray and its libraries open on host ``name``: ranges in order that do not meet."""
    ports = inventory.ports
    single = [value for key, value in ports.model_dump().items() if key != "workers"]
    found = [(port, port) for port in (*single, *RAY_FIXED)] + [ports.workers, EPHEMERAL]
    if name == inventory.head:
        found.append(CLIENT_SERVERS)
    merged: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def unit(inventory: Inventory) -> str:
    """The system unit that loads the rules at boot."""
    return f"workbench-{inventory.name}-firewall.service"


def etc_rules(inventory: Inventory) -> str:
    """Where the loaded rules are kept."""
    return f"/etc/workbench/{table(inventory)}.nft"


def numbers_of(address: str) -> list[str]:
    """The IP addresses of a host. A name is looked up here, for when the rules are loaded at boot nothing can be.

    Raises UserError if the name has none.
    """
    try:
        return [str(ipaddress.ip_address(address))]
    except ValueError:
        pass
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(address, None)}
    except OSError as error:
        raise UserError(
            f"address '{address}' has no IP address from here ({error.strerror}), and the firewall rules need one: "
            f"give the host's IP address in the inventory"
        ) from None
    return sorted(found)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
