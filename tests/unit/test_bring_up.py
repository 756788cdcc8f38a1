"""What a host is given, line by line, for the three machines; and what 'cluster up' finds to do."""

import io
import os
import plistlib
import re
import shlex
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import environments, firewall
from cluster.bring_up import make_plan
from cluster.client_state import fingerprint
from cluster.dry_run import text
from cluster.host_state import FileState, HostState, parse
from cluster.inventory import Inventory, inventory_of
from cluster.render import HostFile, host_environment, host_files, ray_arguments, revision, without_uuid
from cluster.supervisors import supervisor
from workbench.errors import UserError

TOKEN = "0123456789abcdef" * 4
PLAIN, RESERVED = "GPU-11111111-1111-1111-1111-111111111111", "GPU-22222222-2222-2222-2222-222222222222"
SMALL = "GPU-33333333-3333-3333-3333-333333333333"


def card(model: str, memory: float, uuid: str) -> dict[str, object]:
    return {"model": model, "memory_gb": memory, "pcie": {"generation": 5, "width": 16}, "uuid": uuid}


THREE = {
    "head": "system-a",
    "storage": "/mnt/cluster",
    "hosts": {
        "system-a": {
            "address": "192.168.1.10", "user": "ada", "os": "linux", "nccl_p2p": False,
            "cards": [card("rtx-5090", 32, PLAIN), card("rtx-pro-6000", 96, RESERVED)],
        },
        "linux-box": {
            "address": "192.168.1.11", "user": "ada", "os": "linux", "cards": [card("rtx-5060-ti", 16, SMALL)],
        },
        "macbook": {"address": "192.168.1.12", "user": "ada", "os": "macos", "mps": 1},
    },
}  # fmt: skip


@pytest.fixture
def three() -> Inventory:
    return Inventory.model_validate(THREE)


def one_host(**host: object) -> Inventory:
    """A cluster of one host in a folder of the test's own."""
    first = {"address": "127.0.0.2", "user": "ada", "os": "linux", **host}
    return Inventory.model_validate({"head": "only", "storage": "/srv", "hosts": {"only": first}})


def named(files: list[HostFile], end: str) -> HostFile:
    return next(file for file in files if file.path.endswith(end))


def test_the_head_is_told_its_role_its_ports_and_its_cards(three: Inventory) -> None:
    arguments = ray_arguments(three, "system-a")
    expected = [
        "--block", "--head", "--port=6379", "--dashboard-host=127.0.0.1", "--dashboard-port=8265",
        "--node-ip-address=192.168.1.10", "--node-name=system-a", "--num-gpus=1",
        '--resources={"rtx-5090": 1, "rtx-pro-6000": 1}', "--metrics-export-port=8090",
        "--min-worker-port=20000", "--max-worker-port=20999", "--disable-usage-stats",
    ]  # fmt: skip
    assert [argument for argument in expected if argument not in arguments] == []
    labels = next(argument for argument in arguments if argument.startswith("--labels="))
    assert "workbench.host=system-a" in labels
    assert f"workbench.card1.uuid={RESERVED}" in labels


def test_a_worker_joins_the_head_and_opens_no_port_of_the_head(three: Inventory) -> None:
    arguments = ray_arguments(three, "linux-box")
    assert "--address=192.168.1.10:6379" in arguments
    assert not [argument for argument in arguments if argument.startswith(("--head", "--port", "--dashboard-port"))]


def test_a_mac_counts_no_gpu_and_one_mps(three: Inventory) -> None:
    arguments = ray_arguments(three, "macbook")
    assert {"--num-gpus=0", '--resources={"mps": 1}'} <= set(arguments)
    assert host_environment(three, "macbook")["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"


def test_ray_sees_the_plain_card_only_and_its_p2p_setting(three: Inventory) -> None:
    variables = host_environment(three, "system-a")
    assert variables["CUDA_VISIBLE_DEVICES"] == PLAIN
    assert variables["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in host_environment(three, "linux-box")
    assert "CUDA_VISIBLE_DEVICES" not in host_environment(three, "macbook")


def test_only_the_head_keeps_state_and_watches_the_others(three: Inventory) -> None:
    head, worker = host_environment(three, "system-a"), host_environment(three, "linux-box")
    assert head["RAY_gcs_storage"] == "rocksdb"
    assert head["RAY_gcs_storage_path"] == '"$HOME"/.workbench/gcs'
    period, timeout = int(head["RAY_health_check_period_ms"]), int(head["RAY_health_check_timeout_ms"])
    assert int(head["RAY_health_check_failure_threshold"]) * (period + timeout) < 10_000
    assert not [name for name in worker if name.startswith(("RAY_health", "RAY_gcs_storage"))]


def test_the_environment_file_is_private_and_names_the_token_without_holding_it(three: Inventory) -> None:
    for name in three.hosts:
        files = host_files(three, name)
        env = named(files, "/ray.env")
        assert env.mode == 0o600
        assert 'RAY_AUTH_MODE=token\nRAY_AUTH_TOKEN_PATH="$HOME"/.workbench/token\n' in env.content
        assert not [file for file in files if TOKEN in file.content]


def test_an_open_cluster_says_so_to_ray(three: Inventory) -> None:
    variables = host_environment(three, "system-a", open_cluster=True)
    assert variables["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN_PATH" not in variables


def test_a_folder_with_a_space_is_refused() -> None:
    with pytest.raises(UserError, match=r"folder '/data/my wb'.*no spaces"):
        host_files(one_host(folder="/data/my wb"), "only")
    with pytest.raises(UserError, match="absolute path"):
        host_files(one_host(folder="workbench"), "only")


def test_cards_without_a_uuid_are_named() -> None:
    assert without_uuid(one_host(cards=[card("rtx-5090", 32, "")])) == ["only: rtx-5090"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_accepts_the_unit(three: Inventory, tmp_path: Path) -> None:
    start = tmp_path / ".workbench/start"
    start.parent.mkdir()
    start.write_text("#!/bin/sh\n")
    start.chmod(0o755)
    unit = tmp_path / "workbench-home.service"
    unit.write_text(supervisor(three, "system-a").definition.replace("%h", str(tmp_path)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "workbench-home" in line]) == (0, [])
    lines = unit.read_text().splitlines()
    assert {"Restart=always", "KillMode=mixed", "OOMPolicy=continue", "WantedBy=default.target"} <= set(lines)


def test_launchd_runs_the_script_of_the_users_home(three: Inventory) -> None:
    keeper = supervisor(three, "macbook")
    plist = plistlib.loads(keeper.definition.encode())
    assert keeper.definition_path == "~/Library/LaunchAgents/workbench.home.plist"
    assert plist["ProgramArguments"] == ["/bin/sh", "-c", 'exec "$HOME"/.workbench/start']
    assert (plist["KeepAlive"], plist["RunAtLoad"]) == (True, True)


@pytest.mark.parametrize("name", ["system-a", "linux-box", "macbook"])
@pytest.mark.parametrize("keeper", [None, "runit"])
def test_every_script_is_one_for_a_posix_shell(three: Inventory, name: str, keeper: str | None) -> None:
    if keeper and name == "macbook":
        return
    hosts = {**three.hosts, name: three.hosts[name].model_copy(update={"supervisor": keeper})}
    inventory = three.model_copy(update={"hosts": hosts})
    service = supervisor(inventory, name)
    scripts = [file.content for file in host_files(inventory, name) if file.content.startswith("#!/bin/sh")]
    for script in [*scripts, service.enable, service.restart, service.stop, service.state]:
        done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_the_firewall_closes_rays_ports_to_all_but_the_other_hosts(three: Inventory) -> None:
    rules = firewall.rules(three, "system-a")
    assert "ip saddr 192.168.1.11 accept" in rules
    assert "ip saddr 192.168.1.12 accept" in rules
    assert "192.168.1.10 " not in rules
    closed = firewall.closed_ports(three, "system-a")
    for port in (6379, 8090, 8265, 10001, 20000, 20999, 23500, 44217, 44227):
        assert any(first <= port <= last for first, last in closed), port
    assert not any(first <= 22 <= last for first, last in closed)


@pytest.mark.skipif(not shutil.which("nft") or os.getuid() != 0, reason="needs nft and root")
def test_nft_loads_the_rules_and_loads_them_again(three: Inventory, tmp_path: Path) -> None:
    file = tmp_path / "firewall.nft"
    file.write_text(firewall.rules(three, "system-a"))
    script = f"nft -f {file} && nft -f {file} && nft list table inet workbench_home"
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tcp dport @ray_ports") == 1


# --- the start script, run with a stand-in for the environment's Python that prints its arguments


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """The folder of a head whose environment's ``python`` writes its arguments and its Ray variables to a file."""
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    told = 'pwd; printf "%s\\n" "$@"; env | grep -E "^(RAY_|WORKBENCH_)"'
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\n{{ {told}; }} >{tmp_path}/ran\n')
    python.chmod(0o755)
    inventory = one_host(folder=str(tmp_path / "wb"), environment=str(tmp_path / "env"))
    name = f"test-{os.getpid()}"
    inventory = inventory.model_copy(update={"name": name, "token_file": str(tmp_path / "token")})
    (tmp_path / "token").write_text(TOKEN)
    for file in host_files(inventory, "only"):
        path = Path(file.path) if file.path.startswith("/") else tmp_path / "home" / file.path[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.content)
        path.chmod(file.mode)
    yield tmp_path / "wb"
    shutil.rmtree(f"/tmp/workbench-{name}-{os.getuid()}", ignore_errors=True)


def start(host: Path) -> str:
    subprocess.run([str(host / "start")], check=True, env={"PATH": os.environ["PATH"], "HOME": str(host.parent)})
    return (host.parent / "ran").read_text()


def temp_of(host: Path) -> Path:
    """Ray's folder: a path as long as pytest's leaves no room for sockets, so it is the stand-in below /tmp."""
    return Path(start(host).splitlines()[0])


def test_the_start_script_becomes_ray_with_the_rendered_variables(host: Path) -> None:
    ran = start(host)
    assert "-m\nray.scripts.scripts\nstart\n--block\n--head\n" in ran
    assert "--resources={}\n" in ran
    assert f"RAY_AUTH_TOKEN_PATH={host.parent}/token\n" in ran
    state, token = (host / "running").read_text().split()
    assert state in (host / "ray.env").read_text()
    assert token == fingerprint(TOKEN)
    assert stat.S_IMODE((host / "ray.log").stat().st_mode) == 0o600


def test_a_long_home_gets_a_short_folder_for_rays_sockets(host: Path) -> None:
    temp = temp_of(host)
    assert temp == Path(f"/tmp/workbench-test-{os.getpid()}-{os.getuid()}")
    assert stat.S_IMODE(temp.stat().st_mode) == 0o700
    assert f"--temp-dir={temp}" in (host.parent / "ran").read_text()


def test_old_sessions_go_and_the_newest_keeps_its_recent_logs(host: Path) -> None:
    temp = temp_of(host)
    week = time.time() - 9 * 86_400
    sessions = {name: temp / f"session_2026-01-0{day}_test" for day, name in enumerate(("old", "used", "newest"), 1)}
    for session in sessions.values():
        (session / "logs").mkdir(parents=True)
        (session / "sockets").mkdir()
        (session / "logs/old.log").write_text("x")
        os.utime(session / "logs/old.log", (week, week))
    for kept in ("used", "newest"):
        (sessions[kept] / "logs/new.log").write_text("x")
    for folder in ("logs", "sockets", "."):
        os.utime(sessions["old"] / folder, (week, week))
    link = temp / "session_latest"
    link.unlink(missing_ok=True)
    link.symlink_to(sessions["newest"])
    try:
        start(host)
        assert not sessions["old"].exists()
        assert (sessions["used"] / "logs/old.log").exists()
        assert sorted(os.listdir(sessions["newest"])) == ["logs"]
        assert os.listdir(sessions["newest"] / "logs") == ["new.log"]
    finally:
        for session in sessions.values():
            shutil.rmtree(session, ignore_errors=True)
        link.unlink()


def test_five_short_starts_set_the_control_stores_state_aside(host: Path) -> None:
    start(host)
    (host / "gcs/CURRENT").write_text("broken")
    for _ in range(4):
        start(host)
    assert (host / "gcs/CURRENT").exists()
    start(host)
    assert not (host / "gcs/CURRENT").exists()
    assert (host / "gcs.set-aside/CURRENT").exists()
    assert "five short starts in a row" in (host / "ray.log").read_text()


# --- what there is to do


def as_rendered(inventory: Inventory, name: str) -> HostState:
    """The state of a host that has everything, and runs from it."""
    files = host_files(inventory, name)
    there = {file.path: FileState(file.digest, file.mode) for file in files}
    there[inventory.token_file] = FileState(fingerprint(TOKEN) + "0" * 48, 0o600)
    running = (revision(files), fingerprint(TOKEN))
    return HostState("active", there, inventory.name, running, environment=True, firewall="yes")


def test_a_bare_host_gets_everything(three: Inventory) -> None:
    files = host_files(three, "system-a")
    plan = make_plan(three, "system-a", files, HostState(), TOKEN)
    assert (plan.write, plan.token, plan.install, plan.was_running) == (files, True, True, False)
    assert plan.reasons


@pytest.mark.parametrize("name", ["system-a", "linux-box", "macbook"])
def test_a_host_that_is_as_it_should_be_gets_nothing(three: Inventory, name: str) -> None:
    assert make_plan(three, name, host_files(three, name), as_rendered(three, name), TOKEN).nothing


def test_a_change_of_one_host_restarts_that_host_alone(three: Inventory) -> None:
    states = {name: as_rendered(three, name) for name in three.hosts}
    box = three.hosts["linux-box"].model_copy(update={"cpus": 6})
    changed = three.model_copy(update={"hosts": {**three.hosts, "linux-box": box}})
    plans = {name: make_plan(changed, name, host_files(changed, name), states[name], TOKEN) for name in states}
    assert [name for name, plan in plans.items() if plan.reasons] == ["linux-box"]
    assert [name for name, plan in plans.items() if not plan.nothing] == ["linux-box"]


def test_the_firewall_never_closes_ssh_and_looks_names_up_at_once(three: Inventory, tmp_path: Path) -> None:
    keys = three.model_dump(exclude_unset=True)
    keys["hosts"]["system-a"]["ssh_port"] = 40022
    keys["hosts"]["linux-box"]["address"] = "localhost"
    lines = [line.strip() for line in firewall.rules(inventory_of(keys), "system-a").splitlines()]
    assert lines.index("tcp dport 40022 accept") < lines.index("tcp dport @ray_ports counter drop")
    assert "ip saddr 127.0.0.1 accept" in lines or "ip6 saddr ::1 accept" in lines
    assert not any("localhost" in line for line in lines if "saddr" in line)
    keys["hosts"]["linux-box"]["address"] = "no-such-host.invalid"
    with pytest.raises(UserError, match=r"no-such-host.invalid.*give the host's IP address"):
        firewall.rules(inventory_of(keys), "system-a")


def test_a_new_host_rewrites_the_others_firewall_without_a_restart(three: Inventory) -> None:
    state = as_rendered(three, "system-a")
    extra = three.hosts["linux-box"].model_copy(update={"address": "192.168.1.13"})
    grown = three.model_copy(update={"hosts": {**three.hosts, "third": extra}})
    plan = make_plan(grown, "system-a", host_files(grown, "system-a"), state, TOKEN)
    assert [file.path for file in plan.write] == ["~/.workbench/firewall.nft"]
    assert plan.reasons == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"supervisor": "failed"}, "Ray is failed"),
        ({"running": ("earlier", fingerprint(TOKEN))}, "Ray was started from earlier files"),
        ({"running": None}, "the token changed"),
    ],
)
def test_ray_restarts_when_it_is_not_what_the_files_say(three: Inventory, change: dict[str, Any], reason: str) -> None:
    state = as_rendered(three, "linux-box")
    if "running" in change and change["running"] is None:
        change = {"running": (state.running[0], "0" * 16)}
    plan = make_plan(three, "linux-box", host_files(three, "linux-box"), replace(state, **change), TOKEN)
    assert plan.reasons == [reason]


def test_a_token_that_others_may_read_is_written_again_without_a_restart(three: Inventory) -> None:
    state = as_rendered(three, "linux-box")
    state.files[three.token_file] = FileState(state.files[three.token_file].digest, 0o644)
    plan = make_plan(three, "linux-box", host_files(three, "linux-box"), state, TOKEN)
    assert (plan.token, plan.reasons, plan.write) == (True, [], [])


def test_a_folder_of_another_cluster_is_left_alone(three: Inventory) -> None:
    state = replace(as_rendered(three, "linux-box"), cluster="lab")
    with pytest.raises(UserError, match="belongs to the cluster 'lab'"):
        make_plan(three, "linux-box", host_files(three, "linux-box"), state, TOKEN)


def test_what_a_host_reports_is_read_back() -> None:
    said = ["file 1 abc 600", "cluster home", "running r1 f1", "environment yes", "supervisor active"]
    said += ["versions 3.11.2 2.60.0 2.13.0", "log a b"]
    state = parse("\n".join(said), ["~/x", "~/y"])
    assert state.files == {"~/y": FileState("abc", 0o600)}
    assert (state.cluster, state.running, state.environment) == ("home", ("r1", "f1"), True)
    assert state.versions == {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0"}
    assert state.log == ["a b"]


def test_a_dry_run_shows_every_file_and_command_and_no_secret(three: Inventory) -> None:
    files = {name: host_files(three, name) for name in three.hosts}
    shown = text(three, files, open_cluster=False)
    for name in three.hosts:
        for file in files[name]:
            assert f"--- {file.path}  (mode {file.mode:o})" in shown
            assert file.content.rstrip() in shown
    assert "$ systemctl --user restart workbench-home.service" in shown
    assert "$ ssh -t ada@192.168.1.11 sudo sh ~/.workbench/firewall.sh" in shown
    assert "Nothing was touched" in shown
    assert re.search(r"--- ~/.workbench/token  \(mode 600\)  the token, not shown", shown)
    assert shlex.split(ray_arguments(three, "macbook")[-1])


# --- the environment


def test_an_environment_is_named_by_lock_interpreter_and_extra(three: Inventory) -> None:
    head, mac = three.hosts["system-a"], three.hosts["macbook"]
    folder = environments.environment_folder(head)
    assert re.fullmatch(r"~/\.workbench/env/[0-9a-f]{12}/\.venv", folder)
    assert environments.environment_folder(three.hosts["linux-box"]) == folder
    assert environments.environment_folder(mac) != folder
    assert environments.environment_folder(head.model_copy(update={"python": "python3.12"})) != folder
    assert [environments.extra(host) for host in (head, mac, one_host().hosts["only"])] == ["cuda", "none", "cpu"]


def test_a_host_with_an_environment_of_its_own_keeps_it() -> None:
    inventory = one_host(environment="/opt/env")
    assert environments.environment_folder(inventory.hosts["only"]) == "/opt/env"
    files = host_files(inventory, "only")
    assert not make_plan(inventory, "only", files, HostState(environment=True), TOKEN).install
    with pytest.raises(UserError, match="environment /opt/env has no bin/python"):
        make_plan(inventory, "only", files, HostState(), TOKEN)


def test_what_is_sent_is_what_git_tracks() -> None:
    with tarfile.open(fileobj=io.BytesIO(environments.checkout_tar())) as tar:
        names = set(tar.getnames())
        assert tar.getmember("install.sh").mode & 0o100
    assert {*environments.LOCK, "cluster/bring_up.py", "README.md"} <= names
    assert not [name for name in names if name.startswith((".venv/", ".workbench/", "runs/"))]
