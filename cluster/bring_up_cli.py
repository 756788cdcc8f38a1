"""``workbench cluster up|status|down|rotate-token|dashboard|push``."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.inventory import Inventory
from workbench.errors import Failure, UserError

InventoryFile = Annotated[
    Path | None, typer.Option("--inventory", help="The inventory; default: cluster.yaml here, else the last one used.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask, also when jobs run that this ends.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
Hosts = Annotated[list[str] | None, typer.Argument(metavar="[HOST...]", help="Only these hosts.", show_default=False)]


def up(
    inventory: InventoryFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every file and command; touch no host.")] = False,
    yes: Yes = False,
    open_: Annotated[bool, typer.Option("--open", help="Without authentication: whoever reaches it owns it.")] = False,
) -> int:
    """Bring the hosts to what the inventory says; what is so already is left alone."""
    from cluster import bring_up, environments
    from cluster import dry_run as preview
    from cluster.client_state import find_token, inventory_in_use, remember
    from cluster.host_state import look, on_each, run_script
    from cluster.render import host_files, without_uuid
    from cluster.ssh import Remote

    wanted, file = inventory_in_use(inventory)
    open_cluster = _is_open(wanted, open_)
    files = {name: host_files(wanted, name, open_cluster=open_cluster) for name in wanted.hosts}
    if dry_run:
        print(preview.text(wanted, files, open_cluster=open_cluster))
        return 0
    if nameless := without_uuid(wanted):
        raise UserError(
            f"{file}: no uuid for {', '.join(nameless)}, so nothing could be pinned to a card: "
            "'workbench cluster init --discover HOST...' fills them in ('nvidia-smi -L' on the host lists them)"
        )
    token = None if open_cluster else find_token(wanted, make=True)
    states, unreachable = on_each(wanted.hosts, lambda name: look(wanted, name, files[name]))
    if wanted.head in unreachable:
        raise Failure(f"{wanted.head}, the head: {unreachable[wanted.head]}")
    plans = {name: bring_up.make_plan(wanted, name, files[name], state, token) for name, state in states.items()}
    for name, plan in plans.items():
        _say(f"{name}: {_told(plan)}")
    for name, why in unreachable.items():
        _say(f"{name}: {why}")
    head_runs = plans[wanted.head].was_running
    _ask_about_jobs(bring_up.jobs_in_the_way(wanted, plans.values(), token, head_runs=head_runs), yes)
    bring_up.install_environments(wanted, plans.values(), _say)
    _, failed = on_each(plans, lambda name: bring_up.write_files(wanted, plans[name], token))
    if failed:
        raise Failure("\n".join(f"{name}: {why}" for name, why in failed.items()))
    since = dict.fromkeys(plans, 0.0)
    restarts = [name for name, plan in plans.items() if plan.reasons]
    since |= bring_up.restart_hosts(wanted, restarts, open_cluster=open_cluster, say=_say)
    bring_up.wait_until_alive(wanted, since, open_cluster=open_cluster)
    made = [name for name, plan in plans.items() if plan.install]
    on_each(made, lambda name: run_script(Remote(wanted.hosts[name]), environments.remove_others(wanted.hosts[name])))
    remember(file)
    changed = [name for name, plan in plans.items() if not plan.nothing]
    _say(f"changed: {', '.join(changed)}" if changed else "nothing to change")
    _say(f"alive: {', '.join(since)}")
    for name, state in states.items():
        if wanted.hosts[name].os == "linux" and state.firewall != "yes":
            which = "no rules keep" if state.firewall != "old" else "rules of an earlier inventory keep"
            _say(f"{name}: {which} other machines from Ray's ports; once: {preview.firewall_command(wanted, name)}")
    if unreachable:
        raise Failure(f"not reached, so left as they are: {', '.join(unreachable)}")
    return 0


def status(inventory: InventoryFile = None, as_json: AsJson = False) -> int:
    """Hosts, cards, versions, what runs where; exit code 1 unless all hosts are in the cluster."""
    from cluster.client_state import find_token, inventory_in_use
    from cluster.cluster_status import gather, healthy, lines
    from cluster.render import host_files

    wanted, _ = inventory_in_use(inventory)
    token = None if wanted.open_cluster else find_token(wanted, make=False)
    files = {name: host_files(wanted, name, open_cluster=wanted.open_cluster) for name in wanted.hosts}
    found = gather(wanted, files, token)
    print(json.dumps(found) if as_json else "\n".join(lines(found)))
    return 0 if healthy(found) else 1


def down(hosts: Hosts = None, inventory: InventoryFile = None, yes: Yes = False) -> int:
    """Stop Ray on the hosts (all, or those named) and take away what 'up' started; no other Ray is touched."""
    from cluster import bring_up
    from cluster.client_state import find_token, inventory_in_use
    from cluster.host_state import look, on_each
    from cluster.take_down import take_down

    wanted, _ = inventory_in_use(inventory)
    names = _known(wanted, hosts)
    if wanted.head in names and len(names) < len(wanted.hosts):
        raise UserError(f"{wanted.head} is the head, without which the others do nothing: name no host, or others")
    token = None if wanted.open_cluster else find_token(wanted, make=False)
    plans = [bring_up.Plan(name, reasons=["down"], was_running=True) for name in names]
    head_states, _ = on_each([wanted.head], lambda name: look(wanted, name, []))
    head_runs = any(state.supervisor == "active" for state in head_states.values())
    _ask_about_jobs(bring_up.jobs_in_the_way(wanted, plans, token, head_runs=head_runs), yes)
    done, failed = on_each([name for name in names if name != wanted.head], lambda name: take_down(wanted, name))
    if wanted.head in names:
        more, more_failed = on_each([wanted.head], lambda name: take_down(wanted, name))
        done, failed = done | more, failed | more_failed
    for name, note in done.items():
        _say(f"{name}: {note}")
    if failed:
        raise Failure("\n".join(f"{name}: {why}" for name, why in failed.items()))
    return 0


def rotate_token(inventory: InventoryFile = None, yes: Yes = False) -> int:
    """Give the cluster a new token: every host restarts, every job that runs ends."""
    from cluster import bring_up
    from cluster.client_state import find_token, inventory_in_use, keep_token, new_token
    from cluster.host_state import look, on_each
    from cluster.ssh import Remote

    wanted, _ = inventory_in_use(inventory)
    if wanted.open_cluster:
        raise UserError(f"the cluster '{wanted.name}' is open: it has no token")
    old = find_token(wanted, make=False)
    states, unreachable = on_each(wanted.hosts, lambda name: look(wanted, name, []))
    if unreachable:
        raise Failure("nothing was changed: " + "\n".join(f"{name}: {why}" for name, why in unreachable.items()))
    plans = [bring_up.Plan(name, reasons=["rotation"], was_running=True) for name in wanted.hosts]
    head_runs = states[wanted.head].supervisor == "active"
    _ask_about_jobs(bring_up.jobs_in_the_way(wanted, plans, old, head_runs=head_runs), yes)
    token = new_token()
    done, failed = on_each(wanted.hosts, lambda name: Remote(wanted.hosts[name]).put(wanted.token_file, token))
    if failed:
        on_each(done, lambda name: Remote(wanted.hosts[name]).put(wanted.token_file, old))
        raise Failure("the old token is back: " + "\n".join(f"{name}: {why}" for name, why in failed.items()))
    keep_token(wanted, token)
    since = bring_up.restart_hosts(wanted, list(wanted.hosts), open_cluster=False, say=_say)
    bring_up.wait_until_alive(wanted, since, open_cluster=False)
    _say("the old token is worth nothing now; other clients take the new one from the head: "
         f"{wanted.hosts[wanted.head].address}:{wanted.token_file}")  # fmt: skip
    return 0


def dashboard(
    inventory: InventoryFile = None,
    port: Annotated[int | None, typer.Option(help="The port here; default: a free one.", show_default=False)] = None,
) -> int:
    """Open the cluster's dashboard and job API here, through ssh, until Ctrl-C; 'workbench submit' finds it."""
    from cluster import tunnel
    from cluster.client_state import cluster_address, find_token, inventory_in_use
    from cluster.job_client import job_client
    from cluster.ssh import Remote
    from workbench.files import write_json
    from workbench.session import local_cluster, session_file

    wanted, _ = inventory_in_use(inventory)
    if (running := local_cluster()) is not None:
        raise UserError(f"this checkout already talks to {running.dashboard}; end that command first (Ctrl-C in it)")
    if not wanted.open_cluster:
        find_token(wanted, make=False)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    local = port or tunnel.free_port()
    head = Remote(wanted.hosts[wanted.head])
    cluster = cluster_address(wanted, local, open_cluster=wanted.open_cluster)
    process = tunnel.open_tunnel(head, wanted.ports.dashboard, local)
    try:
        job_client(cluster)
        write_json(session_file(), {
            "pid": os.getpid(), "gcs": "", "dashboard": cluster.dashboard, "remote": True,
            "token_file": str(cluster.token_file or ""), "runs_root": str(cluster.runs_root or ""),
        })  # fmt: skip
        _say(f"dashboard and job API of '{wanted.name}': {cluster.dashboard}")
        if cluster.token_file:
            _say(f"the page asks for the token: it is in {cluster.token_file}")
        _say("try in another terminal: workbench submit -- data audit    (Ctrl-C here closes this)")
        while not stop.wait(1):
            if process.poll() is not None:
                process = _reopened(process, head, wanted.ports.dashboard, local, stop)
    except KeyboardInterrupt:
        pass
    finally:
        session_file().unlink(missing_ok=True)
        tunnel.close(process)
    return 0


def push(
    path: Annotated[Path, typer.Argument(help="A file or folder.")],
    inventory: InventoryFile = None,
    name: Annotated[str, typer.Option(help="What it is called there; default: as here.")] = "",
    as_json: AsJson = False,
) -> int:
    """Copy data to the cluster's shared storage and print what a job calls it."""
    from cluster.client_state import inventory_in_use
    from cluster.push import push as copy

    wanted, _ = inventory_in_use(inventory)
    uri = copy(wanted, path, name=name)
    print(json.dumps({"uri": uri}) if as_json else uri)
    return 0


def register(app: typer.Typer) -> None:
    """Make these commands subcommands of ``app``."""
    for command in (up, status, down, dashboard, push):
        app.command()(command)
    app.command("rotate-token")(rotate_token)


def _is_open(inventory: Inventory, word: bool) -> bool:
    if inventory.open_cluster and not word:
        raise UserError(
            f"the inventory says open_cluster: true, so whoever reaches a port of '{inventory.name}' runs code on its "
            "hosts: say it once more with --open, or set open_cluster: false"
        )
    if word and not inventory.open_cluster:
        raise UserError("--open: the inventory says otherwise; set open_cluster: true in it as well")
    return word


def _known(inventory: Inventory, hosts: list[str] | None) -> list[str]:
    unknown = [name for name in hosts or [] if name not in inventory.hosts]
    if unknown:
        raise UserError(f"no host '{unknown[0]}' in the inventory; it has {', '.join(inventory.hosts)}")
    return hosts or list(inventory.hosts)


def _told(plan: Any) -> str:
    if plan.nothing:
        return "as it should be"
    parts = ["install the environment"] if plan.install else []
    parts += [f"write {', '.join(file.path for file in plan.write)}"] if plan.write else []
    parts += ["write the token"] if plan.token else []
    if plan.reasons:
        parts.append(f"{'restart' if plan.was_running else 'start'} Ray ({plan.reasons[0]})")
    return "; ".join(parts)


def _ask_about_jobs(jobs: list[Any] | None, yes: bool) -> None:
    """Go on only if no job would suffer, or a person says so. Raises UserError otherwise."""
    if jobs == [] or yes:
        return
    if jobs is None:
        what = "the head runs but does not say which jobs it has, and this restarts it"
    else:
        what = "this ends or disturbs\n" + "\n".join(
            f"  {job.job} on {', '.join(job.hosts)}: {job.command}" for job in jobs
        )
    if not sys.stdin.isatty():
        raise UserError(f"{what}\ngive --yes to go on; nothing was changed")
    print(f"{what}\ngo on? [y/N] ", end="", file=sys.stderr, flush=True)
    if not sys.stdin.readline().strip().lower().startswith("y"):
        raise UserError("nothing was changed")


def _reopened(process: Any, head: Any, port: int, local: int, stop: threading.Event) -> Any:
    from cluster import tunnel

    _say("the tunnel broke; opening it again")
    tunnel.close(process)
    while not stop.is_set():
        try:
            return tunnel.open_tunnel(head, port, local)
        except Failure as error:
            _say(str(error))
            stop.wait(3)
    return process


def _say(text: str) -> None:
    print(text, file=sys.stderr)
