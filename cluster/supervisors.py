"""What keeps ``ray start --block`` running on a host: a systemd user unit, a launchd agent, or runit.

    keeper = supervisor(inventory, "system-a")
    keeper.definition_path, keeper.definition      # the file
    keeper.restart                                 # shell lines, run over ssh as the host's user

User units, not system units: bringing a cluster up then needs no root on any host, the processes have the rights of
the person whose work they run, and ``loginctl enable-linger`` lets them start at boot and outlive every login.
"""

import plistlib
import textwrap
from dataclasses import dataclass

from cluster.inventory import Inventory
from cluster.start_script import shell_path

SECONDS_TO_STOP = 30

SYSTEMD = """[Unit]
Description=Ray on {host} for the cluster '{cluster}' (workbench)
# It is started again however often it ends.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={start}
Restart=always
RestartSec=2
# Ray's own shutdown first, then whatever it left.
KillMode=mixed
TimeoutStopSec={seconds}
# A task that the kernel kills for memory is Ray's to retry; it must not end the host's Ray.
OOMPolicy=continue
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy=default.target
"""

RUNIT = """#!/bin/sh
# Ray on {host} for the cluster '{cluster}'. Made by 'workbench cluster up', which overwrites changes.
HOME=${{HOME:-$(eval echo "~$(id -un)")}}
export HOME
exec {start}
"""


@dataclass(frozen=True)
class Supervisor:
    """One host's supervisor: the file that defines the service, and shell lines that act on it.

    ``state`` prints ``active``, ``starting``, ``stopped``, ``failed`` or ``absent`` on one line.
    """

    definition_path: str
    definition: str
    mode: int
    enable: str
    restart: str
    stop: str
    state: str


def supervisor(inventory: Inventory, name: str) -> Supervisor:
    """The supervisor of host ``name``."""
    return {"systemd": _systemd, "launchd": _launchd, "runit": _runit}[inventory.hosts[name].keeper](inventory, name)


def _systemd(inventory: Inventory, name: str) -> Supervisor:
    host, unit = inventory.hosts[name], f"workbench-{inventory.name}.service"
    start = f"{host.folder}/start"
    path = f"~/.config/systemd/user/{unit}"
    # A login over ssh may come without these, and systemctl then finds no bus.
    bus = 'XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/run/user/$(id -u)}"; export XDG_RUNTIME_DIR\n'
    return Supervisor(
        definition_path=path,
        definition=SYSTEMD.format(
            host=name,
            cluster=inventory.name,
            start=f"%h/{start[2:]}" if start.startswith("~/") else start,
            seconds=SECONDS_TO_STOP,
        ),
        mode=0o644,
        enable=bus
        + textwrap.dedent(f"""\
            [ -f "/var/lib/systemd/linger/$(id -un)" ] || loginctl enable-linger || {{
                echo "Ray would end with your login; type there: sudo loginctl enable-linger $(id -un)" >&2; exit 1; }}
            systemctl --user daemon-reload
            systemctl --user enable --quiet {unit}"""),
        restart=bus + f"systemctl --user restart {unit}",
        stop=bus + f"systemctl --user disable --quiet --now {unit} 2>/dev/null || true\n"
        f"rm -f {shell_path(path)}\nsystemctl --user daemon-reload",
        state=bus
        + textwrap.dedent(f"""\
            case "$(systemctl --user show -p LoadState -p SubState --value {unit} 2>/dev/null | tr '\\n' ' ')" in
            "loaded running "*) echo active ;;
            "loaded auto-restart"*) echo failed ;;
            "loaded start"*) echo starting ;;
            "loaded "*) echo stopped ;;
            *) echo absent ;;
            esac"""),
    )


def _launchd(inventory: Inventory, name: str) -> Supervisor:
    host, label = inventory.hosts[name], f"workbench.{inventory.name}"
    path = f"~/Library/LaunchAgents/{label}.plist"
    # launchd knows no home directory, a shell does. A person at the screen has the domain gui, a mere ssh login user.
    start = shell_path(f"{host.folder}/start")
    plist = {
        "Label": label,
        "ProgramArguments": ["/bin/sh", "-c", f"exec {start}"],
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 5,
        "ExitTimeOut": SECONDS_TO_STOP,
        "ProcessType": "Interactive",
        "LimitLoadToSessionType": ["Aqua", "Background"],
        "SoftResourceLimits": {"NumberOfFiles": 65536},
    }
    domains = 'for domain in "gui/$(id -u)" "user/$(id -u)"; do'
    bootout = f"{domains} launchctl bootout $domain/{label} 2>/dev/null || true; done"
    return Supervisor(
        definition_path=path,
        definition=plistlib.dumps(plist, sort_keys=False).decode(),
        mode=0o644,
        enable=":",
        restart=f"{bootout}\n{domains} launchctl bootstrap $domain {shell_path(path)} 2>/dev/null && exit 0; done\n"
        f'echo "launchctl could not start {label}; try there: launchctl bootstrap gui/$(id -u) {path}" >&2; exit 1',
        stop=f"{bootout}\nrm -f {shell_path(path)}",
        state=textwrap.dedent(f"""\
            state=absent
            {domains}
                said=$(launchctl print $domain/{label} 2>/dev/null) || continue
                case "$said" in *"state = running"*) state=active ;; *) state=failed ;; esac
            done
            echo $state"""),
    )


def _runit(inventory: Inventory, name: str) -> Supervisor:
    host, service = inventory.hosts[name], f"workbench-{inventory.name}"
    folder = shell_path(host.folder)
    # The user's own runsvdir watches ~/service, as Debian's runit has it; a link there makes the service appear whole.
    definition, link = f"{folder}/sv/{service}", f'"$HOME"/service/{service}'
    return Supervisor(
        definition_path=f"{host.folder}/sv/{service}/run",
        definition=RUNIT.format(host=name, cluster=inventory.name, start=shell_path(f"{host.folder}/start")),
        mode=0o755,
        # A file "down" holds a new service back until it is restarted below: otherwise Ray would start twice.
        enable=f'mkdir -p "$HOME"/service\n[ -L {link} ] || {{ touch {definition}/down; ln -s {definition} {link}; }}',
        restart=textwrap.dedent(f"""\
            n=0
            until sv status {definition} >/dev/null 2>&1; do
                n=$((n + 1))
                [ $n -lt 40 ] || {{ echo "nobody watches ~/service; start there: runsvdir -P ~/service" >&2; exit 1; }}
                sleep 0.5
            done
            rm -f {definition}/down
            sv -w {SECONDS_TO_STOP} force-restart {definition} >/dev/null"""),
        stop=f"[ ! -d {definition} ] || sv -w {SECONDS_TO_STOP} force-shutdown {definition} >/dev/null 2>&1 || true\n"
        f"rm -f {link}\nrm -rf {definition}",
        state=textwrap.dedent(f"""\
            case "$(sv status {definition} 2>/dev/null)" in
            run:*) echo active ;;
            down:*"want up"*) echo failed ;;
            down:*) echo stopped ;;
            *) echo absent ;;
            esac"""),
    )
