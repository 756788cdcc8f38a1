"""A Ray cluster in the lab by ``ray start`` alone, kept up by runit: what Ray does under faults, without our bring-up.

cluster = PlainRay(lab, head="alpha", environment={...})
cluster.start("alpha", cpus=1)
cluster.start("beta", cpus=1, resources={"spot": 1})
"""

import json
import secrets
import time
from collections.abc import Mapping

from lab.host import USER, Host
from lab.lab import ROOT, Lab

PORT = 6379
TOKEN = f"/home/{USER}/token"
RUN = """\
#!/bin/bash
exec >>/home/{user}/ray.log 2>&1
export {exports}
exec {python} -m ray.scripts.scripts start --block {arguments}
"""


class PlainRay:
    """Raylets of one cluster; ``environment`` is every process's."""

    def __init__(self, lab: Lab, head: str, environment: Mapping[str, str]) -> None:
        self.lab = lab
        self.head = lab[head]
        self.token = secrets.token_hex(32)
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": TOKEN,
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ADDRESS": f"{self.head.address}:{PORT}",
            **environment,
        }

    def start(
        self, name: str, *, cpus: int = 1, resources: Mapping[str, float] | None = None, dashboard: bool = False
    ) -> None:
        """Let runit keep one raylet on host ``name``, the head's with the control store."""
        host = self.lab[name]
        host.write(TOKEN, self.token, 0o600, root=False)
        arguments = [
            f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--num-gpus=0",
            "--object-store-memory=80000000", "--disable-usage-stats",
            f"--resources='{json.dumps(dict(resources or {}))}'",
        ]  # fmt: skip
        if host is self.head:
            arguments += ["--head", f"--port={PORT}", f"--include-dashboard={str(dashboard).lower()}"]
            if dashboard:
                arguments += ["--dashboard-host=127.0.0.1"]
        else:
            arguments += [f"--address={self.head.address}:{PORT}"]
        variables = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        exports = " ".join(f"{k}={v}" for k, v in variables.items())
        run = RUN.format(user=USER, exports=exports, python=f"{ROOT}/.venv/bin/python", arguments=" ".join(arguments))
        host.environment.update(self.environment)
        host.write(f"/home/{USER}/ray/run", run, 0o755, root=False)
        host.run(f"ln -sfn /home/{USER}/ray /home/{USER}/service/ray")

    def await_nodes(self, count: int, seconds: float = 90) -> float:
        """Wait until ``count`` nodes are alive; how many seconds it took."""
        began = time.monotonic()
        while (alive := self.alive()) != count:
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{alive} of {count} nodes are alive after {seconds:g} s")
            time.sleep(0.3)
        return time.monotonic() - began

    def alive(self) -> int:
        """How many nodes the control store holds for alive, -1 if it does not answer."""
        return len(alive) if (alive := nodes(self.head)) is not None else -1


NODES = """
import sys
from ray._raylet import GcsClient
from ray.core.generated import gcs_pb2
import os
found = GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info(timeout=3)
for node in found.values():
    if node.state == gcs_pb2.GcsNodeInfo.ALIVE:
        print(node.node_manager_address)
"""


def nodes(host: Host) -> list[str] | None:
    """Addresses of the nodes that are alive, as ``host`` sees them; None if the control store does not answer."""
    done = host.run(f"{ROOT}/.venv/bin/python -", stdin=NODES, check=False, timeout=30)
    return done.stdout.split() if done.returncode == 0 else None
