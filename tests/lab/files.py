"""What a lab host has in /etc and /home before it boots: users, names, keys, sshd's configuration, services."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lab.host import PATH, UID, USER

LAPTOP = "laptop"
SSHD = f"""\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
UsePAM no
UseDNS no
PrintMotd no
PidFile none
SetEnv PATH={PATH}
Subsystem sftp internal-sftp
"""
SERVICES = {
    "sshd": "#!/bin/sh\nexec /usr/sbin/sshd -D -e 2>>/var/log/sshd.log\n",
    f"runsvdir-{USER}": (
        f"#!/bin/sh\nexec 2>&1\nmkdir -p /home/{USER}/service && chown {USER}: /home/{USER}/service\n"
        f"exec env -i HOME=/home/{USER} USER={USER} LOGNAME={USER} PATH={PATH} "
        f"chpst -u {USER} runsvdir -P /home/{USER}/service\n"
    ),
}


def make_keys(folder: Path, names: list[str]) -> Path:
    """Make the user's key and a host key for each of ``names`` in ``folder``."""
    folder.mkdir(mode=0o700)
    for name in ["user", *(f"host-{name}" for name in names)]:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


def write_etc(etc: Path, name: str, addresses: Mapping[str, str], keys: Path) -> None:
    """Write what ``name`` has in /etc beside a copy of the machine's."""
    system = [line for line in Path("/etc/passwd").read_text().splitlines() if _system(line)]
    groups = Path("/etc/group").read_text().splitlines()
    _write(etc / "passwd", "\n".join([*system, f"{USER}:x:{UID}:{UID}:Ada:/home/{USER}:/bin/bash"]) + "\n")
    _write(etc / "group", "\n".join([*(g for g in groups if not g.startswith(f"{USER}:")), f"{USER}:x:{UID}:"]) + "\n")
    users = [line.split(":")[0] for line in system]
    _write(etc / "shadow", "".join(f"{user}:*:19000:0:99999:7:::\n" for user in [*users, USER]), 0o600)
    hosts = "".join(f"{address} {host}\n" for host, address in addresses.items())
    _write(etc / "hosts", f"127.0.0.1 localhost\n::1 localhost\n{hosts}")
    _write(etc / "hostname", f"{name}\n")
    _write(etc / "resolv.conf", "")
    _write(etc / "gitconfig", "[safe]\n\tdirectory = *\n")
    _write(etc / "ssh/sshd_config", SSHD)
    shutil.copy(keys / f"host-{name}", etc / "ssh/ssh_host_ed25519_key")
    for service, script in SERVICES.items():
        _write(etc / "service" / service / "run", script, 0o755)


def write_home(home: Path, name: str, addresses: Mapping[str, str], keys: Path) -> None:
    """Write the user's home: every host admits the key that only the laptop holds."""
    ssh = home / USER / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    if name == LAPTOP:
        shutil.copy(keys / "user", ssh / "id_ed25519")
        known = [f"{host},{address} {(keys / f'host-{host}.pub').read_text()}" for host, address in addresses.items()]
        _write(ssh / "known_hosts", "".join(known))
    else:
        _write(ssh / "authorized_keys", (keys / "user.pub").read_text(), 0o600)
    for path in [home / USER, *(home / USER).rglob("*")]:
        shutil.chown(path, UID, UID)


def _system(line: str) -> bool:
    """Whether a line of passwd names root or a system user."""
    name, _, uid, *_ = line.split(":")
    return name != USER and (int(uid) < 1000 or int(uid) > 60000)


def _write(file: Path, content: str, mode: int = 0o644) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(mode)
