"""Samples in a real Prometheus, through Ray's metrics port; the alert rules on made series, by its own test tool."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from profiling.cluster_recording import ClusterRecording
from profiling.collective_rank import free_port
from profiling.export import ExportConfig, alerts, panels, run
from profiling.exporter import metric_name
from workbench.runs import open_run


@pytest.fixture
def prometheus() -> str:
    program = shutil.which("prometheus")
    if program is None or shutil.which("promtool") is None:
        pytest.skip("prometheus is not installed")
    return program


def written(folder: Path, **keys: Any) -> Path:
    config = ExportConfig(folder=folder, **keys)
    with open_run("profile", "export", config) as opened:
        run(config, opened)
    return folder


def checked(*command: str) -> str:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("ray_session", "runs_root", "prometheus")
def test_a_real_prometheus_has_what_was_sampled(tmp_path: Path) -> None:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    folder = written(
        tmp_path / "files", discovery=str(session.parent / "prom_metrics_service_discovery.json"), interval=1
    )
    assert "SUCCESS" in checked("check", "config", str(folder / "prometheus.yml"))
    samples = ClusterRecording(tmp_path / "samples", hertz=2, export=True)
    port = free_port()
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        [busy] = answer(port, metric_name("cpu.busy"))
        assert 0 <= float(busy["value"][1]) <= 100 and busy["metric"]["host"] == samples.hosts[0]
        [used] = answer(port, metric_name("memory.used"))
        [total] = answer(port, "ray_workbench_host_memory_bytes")
        assert 0 < float(used["value"][1]) < float(total["value"][1])
        for _, _, queries in panels()[8:]:  # those of a host without a card
            for query, _ in queries:
                answer(port, query.replace("[1m]", "[20s]"))
    finally:
        server.terminate()
        server.wait()
        samples.stop()


def answer(port: int, query: str, seconds: float = 120) -> list[dict[str, Any]]:
    """The series that Prometheus finds, as soon as there are some."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        except OSError:
            found = []
        if found or time.monotonic() > end:
            assert found, query
            return found
        time.sleep(0.5)


CARD = '{host="box", device="0"}'
HOST = '{host="box", device=""}'
WELL = {
    f"{metric_name('gpu.temperature')}{CARD}": "60x60",
    f"{metric_name('gpu.memory_used')}{CARD}": "10x60",
    f"ray_workbench_gpu_memory_bytes{CARD}": "32x60",
    f"{metric_name('pcie.width')}{CARD}": "16x60",
    f"ray_workbench_gpu_pcie_width_max{CARD}": "16x60",
    f"{metric_name('gpu.busy')}{CARD}": "90x60",
    f"ray_workbench_gpu_held_bytes{CARD}": "10x60",
    f"{metric_name('memory.used')}{HOST}": "10x60",
    f"{metric_name('memory.used')}" + '{host="other", device=""}': "10x60",
    f"ray_workbench_host_memory_bytes{HOST}": "64x60",
    'up{job="ray", instance="box:8090"}': "1x60",
}
FAULTS = {
    "CardHot": {f"{metric_name('gpu.temperature')}{CARD}": "91x60"},
    "CardMemoryFull": {f"{metric_name('gpu.memory_used')}{CARD}": "31.9x60"},
    "LinkDegraded": {f"{metric_name('pcie.width')}{CARD}": "4x60"},
    "CardIdleWhileHeld": {f"{metric_name('gpu.busy')}{CARD}": "0x60"},
    "HostMemoryFull": {f"{metric_name('memory.used')}{HOST}": "63.9x60"},
    "HostUnreachable": {f"{metric_name('memory.used')}{HOST}": "10x20 _x40"},
    "RecordingEnded": {
        f"{metric_name('memory.used')}" + f'{{host="{name}", device=""}}': "10x20 _x40" for name in ("box", "other")
    },
}
JUST_TAKEN = {f"{metric_name('gpu.busy')}{CARD}": "_x40 0x20", f"ray_workbench_gpu_held_bytes{CARD}": "_x40 10x20"}
"""No fault yet: the card was taken five minutes ago, and idles so far."""


@pytest.mark.parametrize("recorders", [1, 2])
@pytest.mark.usefixtures("runs_root", "prometheus")
def test_each_alert_fires_on_its_fault_and_on_no_other(tmp_path: Path, recorders: int) -> None:
    """Once a card or host, also where two recordings show a series each."""
    folder = written(tmp_path)
    rules = {rule["alert"]: rule for rule in alerts(ExportConfig())["groups"][0]["rules"]}
    assert rules.keys() == FAULTS.keys()
    tests = []
    for fault, changed in {None: {}, "": JUST_TAKEN, **FAULTS}.items():
        series = {**WELL, **changed}
        if recorders == 2:
            series |= {f'{name[:-1]}, WorkerId="2"}}': shown for name, shown in series.items() if "host=" in name}
        counts = [
            {"expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)', "eval_time": "45m",
             "exp_samples": [{"labels": "{}", "value": int(name == fault)}]}
            for name in rules
        ]  # fmt: skip
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": counts,
            }
        )
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}))
    checked("test", "rules", str(file))
