"""What must hold on each host by itself, and against the head: pure functions of the inventory and what was seen.

Each check yields a row a host; ``doctor_cards.py`` has those of NVIDIA's cards, ``doctor_trials.py`` those of trials.
"""

from collections.abc import Iterator

from cluster.doctor_row import GIB, Row, State, gib, worst
from cluster.environments import environment_folder, is_ours
from cluster.examination import Seen
from cluster.facts import Facts, SecretFile
from cluster.inventory import Host, Inventory

MIN_PYTHON, END_PYTHON = (3, 11), (3, 14)
MIN_MEMORY = 8 * GIB
MIN_DISK, GOOD_DISK = 5 * GIB, 30 * GIB
OBJECT_STORE_SHARE = 0.3
"""The part of a host's memory that Ray takes for objects if nobody says how much."""
UP = "workbench cluster up"


def check_reach(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether ssh gets in and finds a Python."""
    for name, host in inventory.hosts.items():
        if (reason := seen.unreachable.get(name)) is None:
            yield Row(name, "ssh", "ok", f"{_login(host)} answers")
            continue
        said, _, line = reason.partition("; try: ")
        if "no Python" in reason:
            line = "xcode-select --install" if host.os == "macos" else f"{_ssh(host)} sudo apt-get install python3"
        yield Row(name, "ssh", "failed", said, "a login without a question", line or f"{_ssh(host)} true")


def check_os(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether the host is what the inventory says."""
    for name, host, facts in _reached(inventory, seen):
        system = facts.system
        words = [system.name or system.os, system.arch, system.chip, f"{system.cpus} CPUs" if system.cpus else None]
        about = ", ".join(filter(None, words))
        if system.os == host.os:
            yield Row(name, "system", "ok", about)
        else:
            yield Row(name, "system", "failed", about, host.os, f"in the inventory: hosts.{name}.os: {system.os}")


def check_python(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Python to the patch against the head's: Ray refuses a node of another one."""
    wanted = _python(inventory, seen, inventory.head)[0]
    for name, host, _ in _reached(inventory, seen):
        version, where = _python(inventory, seen, name)
        if not version:
            need = wanted or f"{MIN_PYTHON[0]}.{MIN_PYTHON[1]}"
            remedy = f"install Python {need} there (uv python install {need}) and set hosts.{name}.python to it"
            yield Row(name, "Python", "failed", f"no {host.python}", wanted or "3.11 to 3.13", f"{remedy}, then: {UP}")
        elif not MIN_PYTHON <= tuple(map(int, version.split(".")[:2])) < END_PYTHON:
            remedy = f"uv python install 3.11, set hosts.{name}.python to it, then: {UP}"
            yield Row(name, "Python", "failed", f"{version} ({where})", "3.11 to 3.13", remedy)
        elif not wanted:
            yield Row(name, "Python", "warning", f"{version} ({where})", "the head's, which is not known",
                      f"mend {inventory.head}, then: workbench cluster doctor")  # fmt: skip
        elif version != wanted:
            made = f"set hosts.{name}.python to it, then: {UP}"
            remedy = f"uv python install {wanted} on {name}, " + (
                made if is_ours(host) else f"make {where} anew with it"
            )
            yield Row(name, "Python", "failed", f"{version} ({where})", f"{wanted}, as on {inventory.head}", remedy)
        else:
            yield Row(name, "Python", "ok", f"{version} ({where})")


def check_packages(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Ray and the other packages that two hosts exchange objects of, against the head's."""
    head = seen.facts.get(inventory.head)
    wanted = _versions(head)
    for name, host, facts in _reached(inventory, seen):
        folder = environment_folder(host)
        if facts.environment is None:
            why = facts.missing.get("environment", "not there")
            state: State = "warning" if is_ours(host) else "failed"
            yield Row(
                name, "packages", state, why, "an environment", UP if is_ours(host) else f"make {folder}, or: {UP}"
            )
            continue
        found = _versions(facts)
        if "ray" not in found:
            yield Row(name, "packages", "failed", f"no ray in {folder}", wanted.get("ray", "ray"),
                      _install(host, "ray", wanted=wanted))  # fmt: skip
            continue
        other = {key for key in found.keys() & wanted.keys() if found[key] != wanted[key]}
        listed = ", ".join(f"{key} {found[key]}" for key in sorted(other) or ["ray", "torch", "vllm"] if key in found)
        if not other:
            yield Row(name, "packages", "ok", listed)
            continue
        expected = ", ".join(f"{key} {wanted[key]}" for key in sorted(other)) + f", as on {inventory.head}"
        remedy = _install(host, *sorted(other), wanted=wanted) if not is_ours(host) else UP
        yield Row(name, "packages", "failed" if "ray" in other else "warning", listed, expected, remedy)


def check_memory(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Memory, and shared memory for the object store where the system has any."""
    for name, host, facts in _reached(inventory, seen):
        system = facts.system
        about = gib(system.memory_bytes)
        if system.available_bytes is not None:
            about += f", {gib(system.available_bytes)} available"
        if system.memory_bytes is None or system.memory_bytes < MIN_MEMORY:
            yield Row(name, "memory", "warning", about, f"at least {gib(MIN_MEMORY)}",
                      f"give this host little: in the inventory hosts.{name}.object_store_gb: 0.5")  # fmt: skip
        else:
            yield Row(name, "memory", "ok", about)
        if host.os == "macos" or system.memory_bytes is None:
            continue
        need = int(host.object_store_gb * GIB if host.object_store_gb else OBJECT_STORE_SHARE * system.memory_bytes)
        if system.shm_bytes is not None and system.shm_bytes >= need:
            yield Row(name, "shared memory", "ok", gib(system.shm_bytes))
            continue
        remedy = f"{_ssh(host)} sudo mount -o remount,size={-(-need // GIB) + 1}G /dev/shm"
        yield Row(name, "shared memory", "warning", facts.missing.get("/dev/shm", gib(system.shm_bytes)),
                  f"{gib(need)} for the object store; else objects go to disk", remedy)  # fmt: skip


def check_disk(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Room for the environment, logs, spilled objects and unpacked jobs."""
    for name, host, facts in _reached(inventory, seen):
        disk = facts.folder
        if disk is None:
            yield Row(name, "disk", "warning", facts.missing.get("disk", "unknown"), gib(GOOD_DISK),
                      f"{_ssh(host)} df -h {host.folder}")  # fmt: skip
            continue
        state: State = "failed" if disk.free_bytes < MIN_DISK else "warning" if disk.free_bytes < GOOD_DISK else "ok"
        about = f"{gib(disk.free_bytes)} free of {gib(disk.total_bytes)} at {host.folder}"
        if state == "ok":
            yield Row(name, "disk", "ok", about)
        else:
            yield Row(name, "disk", state, about, f"at least {gib(GOOD_DISK)} free",
                      f"{_ssh(host)} 'du -xh -d 2 ~ | sort -h | tail', or another hosts.{name}.folder")  # fmt: skip


def check_token(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """The cluster's token: the same on all hosts, and read by its owner alone."""
    if inventory.open_cluster:
        yield Row(inventory.head, "token", "warning", "open_cluster: true: whoever reaches a port runs commands",
                  "a token", f"take open_cluster out of the inventory, then: {UP}")  # fmt: skip
        return
    anywhere = any(facts.token_file and facts.token_file.exists for facts in seen.facts.values())
    head = seen.facts[inventory.head].token_file if inventory.head in seen.facts else None
    path = inventory.token_file
    for name, host, facts in _reached(inventory, seen):
        token = facts.token_file
        if token is None or not token.exists:
            why = facts.missing.get("token file", f"no {path}")
            yield Row(name, "token", "failed" if anywhere else "warning", why, "the cluster's token, 0600", UP)
        elif (row := _readable_by_others(name, host, "token", path, token)) is not None:
            yield row
        elif token.digest is None:
            yield Row(name, "token", "failed", f"{path} is empty or not readable", "the cluster's token", UP)
        elif head is not None and head.exists and token.digest != head.digest:
            yield Row(name, "token", "failed", f"another token than on {inventory.head}", "one token on all hosts", UP)
        else:
            yield Row(name, "token", "ok", f"{path}, {token.mode}")


def check_secrets_file(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """The file that jobs' secrets come from; a host need not have one."""
    for name, host, facts in _reached(inventory, seen):
        file = facts.secrets_file
        if file is not None and file.exists:
            row = _readable_by_others(name, host, "secrets", inventory.secrets_file, file)
            yield row or Row(name, "secrets", "ok", f"{inventory.secrets_file}, {file.mode}")


def check_authentication(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether the Ray that is set up, and every Ray that runs, asks for the token."""
    for name, _, facts in _reached(inventory, seen):
        open_rays = [str(ray.pid) for ray in facts.raylets or [] if ray.auth_mode != "token"]
        rendered = (facts.ray_variables or {}).get("RAY_AUTH_MODE", "")
        if inventory.open_cluster:
            continue
        if rendered and rendered != "token":
            yield Row(name, "token mode", "failed", f"Ray is started with RAY_AUTH_MODE={rendered}", "token", UP)
        elif open_rays:
            yield Row(name, "token mode", "warning", f"Ray runs without a token (process {', '.join(open_rays)})",
                      "no open Ray", f"end it if it is yours; if it is the cluster's: {UP}")  # fmt: skip
        elif facts.raylets or rendered:
            yield Row(name, "token mode", "ok", "token")


def check_listeners(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether a program that is not Ray holds a port that Ray will want."""
    for name, _, facts in _reached(inventory, seen):
        wanted = _ports_of(inventory, name)
        found = [one for one in facts.listening or [] if one.port in wanted and one.program != "ray"]
        states: list[State] = ["warning" if one.program is None else "failed" for one in found]
        if found:
            who = ", ".join(sorted({f"{one.port} by {one.program or 'another user'}" for one in found}))
            keys = ", ".join(sorted({f"ports.{wanted[one.port]}" for one in found}))
            yield Row(name, "ports taken", worst(states), who, "free, or Ray's",
                      f"end that program, or choose another port in the inventory: {keys}")  # fmt: skip


def check_mac(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Ray's switch for macOS, sleep, firewall."""
    tool = "sudo /usr/libexec/ApplicationFirewall/socketfilterfw"
    for name, host, facts in _reached(inventory, seen):
        mac = facts.macos
        if mac is None:
            continue
        switch = None if facts.ray_variables is None else facts.ray_variables.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        if facts.ray_variables is None:
            yield Row(name, "Ray on macOS", "ok", f"not set up yet; '{UP}' sets RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1")
        elif switch == "1":
            yield Row(name, "Ray on macOS", "ok", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1")
        else:
            yield Row(name, "Ray on macOS", "failed", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is not set", "1", UP)
        if mac.sleep_minutes == 0:
            yield Row(name, "sleep", "ok", "never, on mains power")
        else:
            about = facts.missing.get("sleep", f"after {mac.sleep_minutes} idle minutes on mains power")
            yield Row(name, "sleep", "warning", about, "never: a host that sleeps is a dead host",
                      f"{_ssh(host)} sudo pmset -c sleep 0")  # fmt: skip
        if mac.firewall == "off":
            yield Row(name, "firewall", "ok", "off")
        elif mac.firewall == "blocks all":
            yield Row(name, "firewall", "failed", mac.firewall, "Ray's Python let in",
                      f"{_ssh(host)} {tool} --setblockall off")  # fmt: skip
        else:
            python = f"$(readlink -f {environment_folder(host)}/bin/python)"
            yield Row(name, "firewall", "warning", facts.missing.get("firewall", "on"), "Ray's Python let in",
                      f"on {name}: {tool} --add {python} --unblockapp {python}")  # fmt: skip


def check_linger(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether systemd is there, and keeps a user's units when nobody is logged in."""
    for name, host, facts in _reached(inventory, seen):
        if host.keeper != "systemd" or facts.systemd is None:
            continue
        if not facts.systemd.running:
            yield Row(name, "supervisor", "failed", "systemd does not run here", "systemd",
                      f"in the inventory: hosts.{name}.supervisor: runit")  # fmt: skip
        elif not facts.systemd.lingers:
            yield Row(name, "supervisor", "warning", "units end at logout", "lingering on",
                      f"{_ssh(host)} sudo loginctl enable-linger {host.user}")  # fmt: skip
        else:
            yield Row(name, "supervisor", "ok", "systemd, lingering on")


CHECKS = [
    check_reach, check_os, check_python, check_packages, check_memory, check_disk, check_linger, check_token,
    check_secrets_file, check_authentication, check_listeners, check_mac,
]  # fmt: skip


def _reached(inventory: Inventory, seen: Seen) -> Iterator[tuple[str, Host, Facts]]:
    return ((name, host, seen.facts[name]) for name, host in inventory.hosts.items() if name in seen.facts)


def _login(host: Host) -> str:
    return f"{host.user}@{host.address}"


def _ssh(host: Host) -> str:
    return f"ssh -t {'' if host.ssh_port == 22 else f'-p {host.ssh_port} '}{_login(host)}"


def _python(inventory: Inventory, seen: Seen, name: str) -> tuple[str, str]:
    """The version of the Python that Ray runs in on ``name``, or will be made with, and where it is."""
    facts, host = seen.facts.get(name), inventory.hosts[name]
    if facts is None:
        return "", ""
    if facts.environment is not None:
        return facts.environment.python, environment_folder(host)
    interpreter = facts.pythons.get(host.python)
    return (interpreter.version, interpreter.path) if interpreter else ("", "")


def _versions(facts: Facts | None) -> dict[str, str]:
    """Versions without the local part: 2.13.0+cpu and 2.13.0+cu130 read the same pickles."""
    packages = facts.environment.packages if facts is not None and facts.environment is not None else {}
    return {name.removesuffix("-cpu"): version.partition("+")[0] for name, version in packages.items()}


def _install(host: Host, *packages: str, wanted: dict[str, str]) -> str:
    if is_ours(host):
        return UP
    pins = " ".join(f"{name}=={wanted[name]}" if name in wanted else name for name in packages)
    return f"{_ssh(host)} {environment_folder(host)}/bin/python -m pip install {pins}"


def _readable_by_others(name: str, host: Host, check: str, path: str, file: SecretFile) -> Row | None:
    if not file.owned:
        return Row(name, check, "failed", f"{path} belongs to another user", f"{host.user}'s own, 0600",
                   f"{_ssh(host)} sudo chown {host.user} {path}")  # fmt: skip
    if int(file.mode, 8) & 0o077:
        return Row(name, check, "failed", f"{path} has mode {file.mode}: others can read it", "0600",
                   f"{_ssh(host)} chmod 600 {path}")  # fmt: skip
    return None


def _ports_of(inventory: Inventory, name: str) -> dict[int, str]:
    """Every port that Ray must have on ``name``, by the inventory's key; workers' it skips if taken."""
    ports = inventory.ports
    on_head_alone = {"gcs", "dashboard", "client"}
    keys = [key for key in type(ports).model_fields if key != "workers"]
    return {getattr(ports, key): key for key in keys if name == inventory.head or key not in on_head_alone}
