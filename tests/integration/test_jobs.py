"""Commands as Ray jobs on a head of our own: the path from a laptop to a cluster."""

import getpass
import hashlib
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.job_client import job_client
from cluster.job_secrets import FILE_VARIABLE
from cluster.job_spec import HOLD_VARIABLE, EntrypointResources, JobSpec
from cluster.jobs import follow, request_job, state_of_job, submit, submit_spec
from cluster.local_head import local_head
from workbench.errors import UserError
from workbench.session import ClusterAddress, token_environment

CHECKOUT = Path(__file__).resolve().parents[2]
LIST = ["runs", "list", "--json"]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A secret in the file that the head's host is told to read secrets from."""
    value = f"lab-{secrets.token_hex(8)}"
    file = tmp_path_factory.mktemp("secrets") / "secrets.env"
    file.write_text(f"LAB_SECRET={value}\n")
    file.chmod(0o600)
    os.environ[FILE_VARIABLE] = str(file)
    yield value
    os.environ.pop(FILE_VARIABLE)


@pytest.fixture(scope="module")
def head(secret: str) -> Iterator[ClusterAddress]:
    with local_head(cpus=2) as cluster:
        yield cluster


def workbench(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_job_ends_with_the_exit_code_of_its_command(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    written: list[str] = []
    assert follow(client, submit(client, LIST, runs_root=tmp_path), written.append) == 0
    assert "[]" in "".join(written)
    assert follow(client, submit(client, ["data", "audit", "nonsense"], runs_root=tmp_path), written.append) == 2
    assert "'nonsense' is neither a config file" in "".join(written)


def test_submit_finds_the_running_head_and_prints_json_alone(head: ClusterAddress, tmp_path: Path) -> None:
    done = workbench("submit", "--json", "--name", "listing", "--", *LIST, WORKBENCH_RUNS_ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"job": "listing", "exit_code": 0}
    rows = json.loads(workbench("jobs", "list", "--json").stdout)
    assert {"job": "listing", "state": "SUCCEEDED"}.items() <= rows[0].items()
    assert workbench("jobs", "logs", "listing").stdout.endswith("[]\n")
    assert json.loads(workbench("jobs", "logs", "listing", "--json").stdout)["log"].endswith("[]\n")
    assert json.loads(workbench("jobs", "stop", "listing", "--json").stdout) == {"job": "listing", "stopping": False}


def test_a_request_without_the_token_is_refused(head: ClusterAddress) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    assert head.token_file is not None
    assert stat.S_IMODE(head.token_file.stat().st_mode) == 0o600


def test_entrypoint_resources_reach_the_job(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    job = submit(client, LIST, runs_root=tmp_path, resources=EntrypointResources(cpus=0.5))
    assert follow(client, job, lambda _: None) == 0


def test_a_config_file_outside_the_checkout_is_refused_before_submission(head: ClusterAddress) -> None:
    done = workbench("submit", "--", "data", "audit", "missing.yaml")
    assert done.returncode == 2
    assert "missing.yaml is not in this checkout" in done.stderr


def test_an_unknown_job_is_a_user_error(head: ClusterAddress) -> None:
    done = workbench("jobs", "status", "nope")
    assert (done.returncode, "no job 'nope'" in done.stderr) == (2, True)


def test_a_job_id_that_exists_is_refused(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    submit(client, LIST, runs_root=tmp_path, name="twice")
    with pytest.raises(UserError, match="already"):
        submit(client, LIST, runs_root=tmp_path, name="twice")
    with pytest.raises(UserError, match="--name twice: the cluster already has") as refused:
        request_job(client, "twice", JobSpec(LIST, tmp_path).arguments())
    assert "\n" not in str(refused.value)


def test_a_job_outlives_a_submit_that_is_told_to_end(head: ClusterAddress, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench", "submit", "--name", "on", "--", "profile", "record", "seconds=300"]
    environment = {**os.environ, "WORKBENCH_RUNS_ROOT": str(tmp_path)}
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    _until(lambda: any((tmp_path / "profile-record").glob("*/status.json")))
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "no longer following on, which goes on; stop it with: workbench jobs stop on" in output
    assert json.loads(workbench("jobs", "status", "on", "--json").stdout)["state"] == "RUNNING"
    assert workbench("jobs", "stop", "on").returncode == 0
    _until(lambda: json.loads(workbench("jobs", "status", "on", "--json").stdout)["state"] == "STOPPED")


def test_interrupting_submit_without_a_terminal_stops_the_job(head: ClusterAddress, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench", "submit", "--name", "long", "--", "profile", "record", "seconds=300"]
    environment = {**os.environ, "WORKBENCH_RUNS_ROOT": str(tmp_path)}
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    runs = tmp_path / "profile-record"
    _until(lambda: any(runs.glob("*/status.json")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    _until(lambda: json.loads(workbench("jobs", "status", "long", "--json").stdout)["state"] == "STOPPED")


def test_a_plain_ray_line_does_the_same(head: ClusterAddress, tmp_path: Path) -> None:
    line = workbench("submit", "--dry-run", "--runs", str(tmp_path), "--", *LIST).stdout.strip()
    assert line.endswith("-- exec python -m workbench runs list --json")
    assert head.token_file is not None
    environment = {**os.environ, **token_environment(head.token_file)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(line, shell=True, cwd=CHECKOUT, env={**environment, "PATH": path}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout


def test_a_secret_reaches_the_job_and_its_workers_and_nothing_that_can_be_read(
    head: ClusterAddress, tmp_path: Path, secret: str
) -> None:
    done = workbench(
        "submit", "--secret", "LAB_SECRET", "--name", "secretive", "--", *LIST, WORKBENCH_RUNS_ROOT=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    client = job_client(head)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    spec = JobSpec(LIST, tmp_path, secrets=["LAB_SECRET"])
    look = f"{sys.executable} {write_probe(tmp_path)}"
    job = request_job(client, "probe", {**spec.arguments(), "entrypoint": look})
    written: list[str] = []
    assert follow(client, job, written.append) == 0, "".join(written)
    assert f"worker {digest}" in "".join(written)
    told = json.dumps([str(vars(client.get_job_info(name))) for name in ("secretive", "probe")])
    logs = client.get_job_logs("secretive") + client.get_job_logs("probe")
    assert "LAB_SECRET" in told
    assert secret not in told + logs
    assert not [file for file in logs_of(head) if secret in file.read_text(errors="replace")]


@pytest.mark.soak
def test_the_replica_of_a_served_model_has_its_jobs_secrets(head: ClusterAddress, tmp_path: Path, secret: str) -> None:
    """Ray Serve LLM has a worker hook of its own, which must not take ours away."""
    pytest.importorskip("vllm")
    script = tmp_path / "serve_probe.py"
    script.write_text(SERVE_PROBE)
    arguments = JobSpec(LIST, tmp_path, secrets=["LAB_SECRET"]).arguments()
    client = job_client(head)
    written: list[str] = []
    job = request_job(client, "serving", {**arguments, "entrypoint": f"{sys.executable} {script}"})
    assert follow(client, job, written.append) == 0, "".join(written)
    assert f"replica {hashlib.sha256(secret.encode()).hexdigest()}" in "".join(written)


PROBE = """
import hashlib, os, ray
@ray.remote
def look():
    return hashlib.sha256(os.environ["LAB_SECRET"].encode()).hexdigest()
ray.init()
print("worker", ray.get(look.remote()))
"""
SERVE_PROBE = """
import hashlib, os, ray
from ray import serve
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from cluster.nodes import member_nodes
from serve.engine import ModelConfig, engine_place, llm_config
@serve.deployment
class Replica:
    def __call__(self):
        return hashlib.sha256(os.environ["LAB_SECRET"].encode()).hexdigest()
ray.init()
model = ModelConfig(name="m", source="owner/model", cpus=0.1)
options = LLMServer.get_deployment_options(llm_config(model, engine_place(model, member_nodes())))
handle = serve.run(Replica.options(**options).bind(), name="probe", route_prefix=None)
print("replica", handle.remote().result(timeout_s=60))
serve.shutdown()
"""


def write_probe(folder: Path) -> Path:
    """A script that says the digest of the secret that a worker has."""
    script = folder / "probe.py"
    script.write_text(PROBE)
    return script


def logs_of(head: ClusterAddress) -> list[Path]:
    """Every log of the head's session."""
    ours = [p for p in psutil.process_iter(["cmdline"]) if f"--gcs-address={head.gcs}" in (p.info["cmdline"] or [])]
    session = next(a for p in ours for a in p.info["cmdline"] if a.startswith(("--session-dir=", "--session_dir=")))
    return [file for file in Path(session.partition("=")[2], "logs").rglob("*") if file.is_file()]


def test_a_secret_that_the_host_lacks_ends_the_job_with_its_name(head: ClusterAddress, tmp_path: Path) -> None:
    done = workbench("submit", "--secret", "ABSENT", "--", *LIST, WORKBENCH_RUNS_ROOT=str(tmp_path))
    assert done.returncode == 2
    assert "has no ABSENT" in done.stdout


def test_a_job_starts_after_another_and_not_after_a_failed_one(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    slow = submit(client, ["profile", "record", "seconds=6"], runs_root=tmp_path, name="slow")
    next_ = submit_spec(client, JobSpec(LIST, tmp_path, after=[slow]), "next")
    _until(lambda: "waiting for slow" in client.get_job_logs("next"))
    assert json.loads(workbench("jobs", "status", "next", "--json").stdout)["waits_for"] == "slow (running)"
    written: list[str] = []
    assert follow(client, next_, written.append) == 0
    assert "starting next.1" in "".join(written) and "profile-record" in "".join(written)  # the recorded run is listed
    ended = {job: client.get_job_info(job).end_time for job in ("slow", "next.1")}
    assert ended["slow"] <= client.get_job_info("next.1").start_time <= ended["next.1"]
    bad = submit(client, ["data", "audit", "nonsense"], runs_root=tmp_path, name="bad")
    never = submit_spec(client, JobSpec(LIST, tmp_path, after=["slow", bad]), "never")
    written.clear()
    assert follow(client, never, written.append) == 1
    assert "not started: bad ended as FAILED" in "".join(written)
    with pytest.raises(UserError, match="would never start"):
        submit_spec(client, JobSpec(LIST, tmp_path, after=[bad]))
    with pytest.raises(UserError, match="no job 'nobody'"):
        submit_spec(client, JobSpec(LIST, tmp_path, after=["nobody"]))


def test_a_failed_command_is_tried_again_and_a_mistake_is_not(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    counted = tmp_path / "count"
    spec = JobSpec(LIST, tmp_path, retries=2)
    held = json.loads(spec.runtime_env()["env_vars"][HOLD_VARIABLE])
    held["entrypoint"] = f"echo x >> {counted}; test $(wc -l < {counted}) -ge 2"
    arguments = spec.arguments()
    arguments["runtime_env"]["env_vars"][HOLD_VARIABLE] = json.dumps(held)
    written: list[str] = []
    assert follow(client, request_job(client, "again", arguments), written.append) == 0
    assert "again.1 ended with exit code 1; 2 left to try" in "".join(written)
    assert counted.read_text() == "x\nx\n"
    wrong = submit_spec(client, JobSpec(["data", "audit", "nonsense"], tmp_path, retries=3), "wrong")
    assert follow(client, wrong, lambda _: None) == 2
    jobs = {row["job"]: row for row in json.loads(workbench("jobs", "list", "--json").stdout)}
    assert {"wrong.1", "again.2"} <= jobs.keys() and "wrong.2" not in jobs
    assert jobs["wrong"]["owner"] == f"{getpass.getuser()}@{socket.gethostname()}"
    assert jobs["wrong.1"]["part_of"] == "wrong"


def test_stopping_a_supervisor_stops_its_attempt(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    job = submit_spec(client, JobSpec(["profile", "record", "seconds=300"], tmp_path, retries=1), "watched")
    _until(lambda: any((tmp_path / "profile-record").glob("*/status.json")))
    client.stop_job(job)
    _until(lambda: state_of_job(client, "watched.1") == "STOPPED")
    _until(lambda: state_of_job(client, "watched") == "STOPPED")


def test_a_request_that_no_host_can_satisfy_is_refused_before_submission(head: ClusterAddress, tmp_path: Path) -> None:
    root = {"WORKBENCH_RUNS_ROOT": str(tmp_path)}
    before = len(job_client(head).list_jobs())
    audit = ["data", "audit", "configs/demo/audit.yaml"]
    for flags, said in [
        (["--cpus", "64", "--", *audit], "no room for 64 CPU, even when all is idle"),
        (["--gpu", "rtx-5090", "--", *LIST], "no card in this cluster"),
        (["--host", "nowhere", "--", *LIST], "no host 'nowhere'"),
    ]:
        done = workbench("submit", *flags, **root)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert len(job_client(head).list_jobs()) == before


def test_a_pending_job_says_what_it_waits_for(head: ClusterAddress, tmp_path: Path) -> None:
    client = job_client(head)
    both = EntrypointResources(cpus=2)
    first = submit(client, ["profile", "record", "seconds=300"], runs_root=tmp_path, name="holds", resources=both)
    _until(lambda: state_of_job(client, first) == "RUNNING")
    submit(client, LIST, runs_root=tmp_path, name="waits", resources=both)
    status = ["jobs", "status", "waits", "--json"]
    _until(lambda: "0 of 2 CPU free" in json.loads(workbench(*status).stdout)["waits_for"])
    client.stop_job(first)
    assert follow(client, "waits", lambda _: None) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_head_ends_with_the_command_that_started_it(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "workbench", "cluster", "local", "--cpus", "1"]
    environment = {**os.environ, "WORKBENCH_STATE": str(tmp_path)}
    parent = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stderr=subprocess.DEVNULL)
    _until((tmp_path / "cluster.json").exists)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    parent.send_signal(how)
    parent.wait(40)
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.2)
