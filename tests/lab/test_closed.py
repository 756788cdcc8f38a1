"""Without the token: what is refused, and the list of what answers anyway; with the firewall rules nothing is left."""

import json

import pytest

from cluster.firewall import RAY_FIXED
from lab.lab import ROOT
from lab.site import BOX, HEAD, SPARE, Site

pytestmark = pytest.mark.lab

DRIVER = "import ray; ray.init(address='{address}', log_to_driver=False); print('LET IN')"
STORE = """
from ray._raylet import GcsClient
client = GcsClient(address='{address}')
client.internal_kv_put(b'stranger', b'was here', True, None, timeout=5)
print('LET IN')
"""
ASK = """
import json, urllib.error, urllib.request
paths = ["GET /api/jobs/", "POST /api/jobs/", "GET /nodes?view=summary", "GET /api/v0/nodes", "GET /api/v0/logs",
         "GET /api/cluster_status", "GET /api/serve/applications/", "PUT /api/serve/applications/",
         "GET /logical/actors", "GET /api/packages/gcs/none.zip"]
codes = {}
for asked in paths:
    for token in ("", "Bearer wrong"):
        method, path = asked.split()
        request = urllib.request.Request(f"http://127.0.0.1:8265{path}", method=method,
                                         data=None if method == "GET" else b"{}")
        if token:
            request.add_header("Authorization", token)
        try:
            codes[asked + token] = urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            codes[asked + token] = error.code
print(json.dumps(codes))
"""
KNOCK = """
import concurrent.futures, json, socket, sys, urllib.error, urllib.request

def knock(door):
    host, port = door
    codes = {}
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return None
    for path in ("/", "/metrics", "/api/healthz", "/api/local_raylet_healthz", "/api/gcs_healthz", "/logs"):
        try:
            codes[path] = urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5).status
        except urllib.error.HTTPError as error:
            codes[path] = error.code
        except Exception:
            pass  # it does not speak HTTP
    return codes

doors = DOORS
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    answers = [[port, codes] for (_, port), codes in zip(doors, pool.map(knock, doors)) if codes is not None]
print(json.dumps(answers))
"""


def stranger(site: Site, code: str, *, variables: str = "RAY_AUTH_MODE=disabled", host: str = "") -> str:
    """Run ``code`` without the token (on the laptop, or on ``host``); what it printed."""
    where = site.lab[host] if host else site.lab.laptop
    script = f"cd /tmp && {variables} PYTHONPATH={ROOT} timeout 60 {ROOT}/.venv/bin/python -"
    done = where.run(script, stdin=code, timeout=90, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("variables", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong"])
@pytest.mark.parametrize("code", [DRIVER, STORE], ids=["driver", "store"])
def test_no_way_in_for_a_driver(site: Site, code: str, variables: str) -> None:
    gcs = f"{site.lab[HEAD].address}:6379"
    said = stranger(site, code.format(address=gcs), variables=variables, host=SPARE)
    assert "LET IN" not in said and said.strip()


@pytest.mark.parametrize("variables", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong"])
def test_no_way_in_for_a_client(site: Site, variables: str) -> None:
    said = stranger(site, DRIVER.format(address=f"ray://{site.lab[HEAD].address}:10001"), variables=variables)
    assert "LET IN" not in said and said.strip()


def test_no_job_and_no_question_by_http(site: Site) -> None:
    """Asked on the head itself, where the dashboard listens."""
    codes = json.loads(site.lab[HEAD].run(f"{ROOT}/.venv/bin/python -", stdin=ASK).stdout)
    assert len(codes) == 20 and set(codes.values()) <= {401, 403}, codes


def test_what_answers_anyway_and_that_the_firewall_closes_it(site: Site) -> None:
    members = [HEAD, BOX, SPARE]
    doors = [(site.lab[name].address, port) for name in members for port in _ports(site, name)]
    code = KNOCK.replace("DOORS", repr(doors))
    answers = json.loads(stranger(site, code).splitlines()[-1])
    assert len(answers) == len(doors), "Ray's ports can be reached by everybody until the rules are loaded"
    told = {
        f"{_kind(port)}{'' if 'metrics' in _kind(port) else path}"
        for port, codes in answers
        for path in codes
        if codes[path] == 200
    }
    assert told == {
        "agent/api/healthz", "agent/api/local_raylet_healthz", "metrics", "metrics of monitor and dashboard",
    }, "what answers without the token is not what docs/operations.md lists"  # fmt: skip
    for name in members:
        site.lab[name].run("sh ~ada/.workbench/firewall.sh", root=True)
    try:
        assert json.loads(stranger(site, code).splitlines()[-1]) == [], "no port is open to a stranger"
        assert site.in_cluster() == set(members), "among the hosts nothing is closed"
        seen = site.python(SPARE, "import ray; ray.init(log_to_driver=False); f = ray.remote(lambda: ray.util."
                           "get_node_ip_address()).options(num_cpus=0.1, scheduling_strategy='SPREAD')\n"
                           "print(*set(ray.get([f.remote() for _ in range(12)])))")  # fmt: skip
        assert len(seen.split()) >= 2
    finally:
        for name in members:
            site.lab[name].run("sh ~ada/.workbench/firewall.sh remove", root=True)


def _ports(site: Site, name: str) -> list[int]:
    """The ports on which host ``name`` listens for others, ssh's left out."""
    lines = site.lab[name].run("ss -Hltn").stdout.splitlines()
    local = [line.split()[3].rpartition(":") for line in lines]
    return sorted({int(port) for address, _, port in local if not address.startswith("127.")} - {22})


def _kind(port: int) -> str:
    """What listens on ``port`` of an inventory with the default ports."""
    fixed = dict.fromkeys(RAY_FIXED, "metrics of monitor and dashboard")
    return {8090: "metrics", 6382: "agent", **fixed}.get(port, str(port))
