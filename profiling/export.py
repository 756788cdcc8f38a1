"""``workbench profile export``: what Prometheus and Grafana need to watch the hosts, as files.

    workbench profile export folder=/etc/prometheus/workbench-hosts
    workbench submit --detach --name watch -- profile record configs/profile/watch.yaml
    prometheus --config.file=/etc/prometheus/workbench-hosts/prometheus.yml

A 'profile record' shows its samples on the metrics port of each host's Ray agent, so one scrape of Ray has them all;
Ray's head keeps the list of its agents in a file. ``alerts.yml`` has the rules, ``dashboard.json`` is for Grafana.
"""

from typing import Any

from pydantic import Field

from profiling.exporter import HELD, PREFIX, metric_name
from profiling.monitoring import Panel, dashboard, ray_targets, write_files
from workbench.config import Config, OutputPath
from workbench.runs import Run, Summary

HELD_METRIC = f"ray_{PREFIX}{HELD}"
LIMIT = f"ray_{PREFIX}gpu_"
"""Begins the names of what a card could have."""


class ExportConfig(Config):
    """Where the files go, and when to be told."""

    folder: OutputPath | None = Field(None, description="where the files go; default: the run's artifacts")
    discovery: str = Field(
        "/tmp/ray/prom_metrics_service_discovery.json", description="Ray's list of its agents, on the head"
    )
    interval: int = Field(10, ge=1, description="seconds between two scrapes")
    hot: float = Field(85.0, gt=0, description="alert above so many degrees Celsius")
    memory_share: float = Field(0.97, gt=0, lt=1, description="alert where more of a card's or host's memory is used")
    idle_percent: float = Field(5.0, gt=0, description="a card that is less busy than that idles")
    idle_minutes: int = Field(10, ge=1, description="alert where a card idles so long while a job holds it")


def run(config: ExportConfig, run: Run) -> Summary:
    """Write the three files. Raises UserError where the folder cannot be made."""
    folder, board = config.folder or run.artifact("export"), dashboard("hosts", panels())
    return write_files(folder, run, [ray_targets(config.discovery)], config.interval, alerts(config), board)


def alerts(config: ExportConfig) -> dict[str, Any]:
    """The alert rules."""
    busy, memory = metric_name("gpu.busy"), metric_name("memory.used")
    card = "card {{ $labels.device }} of {{ $labels.host }}"
    on = "on (host, device)"

    def one(series: str) -> str:
        """One series a card: two recordings at once, or a sampler that was started again, show a series each."""
        return f"max by (host, device) ({series})"

    def rule(name: str, expr: str, minutes: int, severity: str, text: str) -> dict[str, Any]:
        return {
            "alert": name, "expr": expr, "for": f"{minutes}m", "labels": {"severity": severity},
            "annotations": {"summary": text},
        }  # fmt: skip

    rules = [
        rule(
            "CardHot", f"{one(metric_name('gpu.temperature'))} > {config.hot:g}", 5, "warning",
            f"{card} has {{{{ $value }}}} degrees Celsius.",
        ),
        rule(
            "CardMemoryFull",
            f"{one(metric_name('gpu.memory_used'))} / {on} {one(LIMIT + 'memory_bytes')} > {config.memory_share:g}",
            5, "warning",
            f"{card}: {{{{ $value | humanizePercentage }}}} of its memory is used.",
        ),
        rule(
            "LinkDegraded", f"{one(metric_name('pcie.width'))} < {on} {one(LIMIT + 'pcie_width_max')}", 5, "warning",
            f"{card}: its PCIe link runs at x{{{{ $value }}}} only.",
        ),
        rule(
            "CardIdleWhileHeld",
            f"{one(f'avg_over_time({busy}[{config.idle_minutes}m])')} < {config.idle_percent:g} and {on} "
            f"{one(f'min_over_time({HELD_METRIC}[{config.idle_minutes}m])')} > 0 and {on} "
            f"{one(f'{HELD_METRIC} offset {config.idle_minutes}m')} > 0",  # a younger series has no such average yet
            1, "warning", f"{card} idles while a job holds it.",
        ),
        rule(
            "HostMemoryFull",
            f"{one(memory)} / on (host) {one(f'ray_{PREFIX}host_memory_bytes')} > {config.memory_share:g}", 2,
            "warning", "{{ $labels.host }}: {{ $value | humanizePercentage }} of its memory is used.",
        ),
        rule(
            "HostUnreachable",
            f'up{{job="ray"}} == 0 or ({one(f"last_over_time({memory}[1d])")} unless on (host) {memory}) '
            f"and on () count({memory}) > 0",
            1, "critical", "{{ $labels.host }}{{ $labels.instance }} no longer tells its samples.",
        ),
        rule(
            "RecordingEnded", f"count(last_over_time({memory}[1d])) > 0 unless on () count({memory})", 5, "warning",
            "No host tells its samples any more: the recording has ended, or all hosts are away.",
        ),
    ]  # fmt: skip
    return {"groups": [{"name": "workbench-hosts", "rules": rules}]}


def panels() -> list[Panel]:
    """What the dashboard shows."""

    def gauge(metric: str, legend: str = "{{host}} card {{device}}", scale: str = "") -> tuple[str, str]:
        return metric_name(metric) + scale, legend

    def rate(metric: str, legend: str) -> tuple[str, str]:
        return f"sum by (host) (rate({metric_name(metric)}[1m]))", legend

    return [
        ("GPU utilisation", "percent", [gauge("gpu.busy")]),
        ("GPU memory", "bytes", [gauge("gpu.memory_used")]),
        ("GPU power", "watt", [gauge("gpu.power")]),
        ("GPU temperature", "celsius", [gauge("gpu.temperature")]),
        (
            "PCIe traffic", "Bps",
            [
                gauge("pcie.received", "to {{host}} card {{device}}"),
                gauge("pcie.sent", "from {{host}} card {{device}}"),
            ],
        ),
        ("GPU clock, MHz", "short", [gauge("gpu.sm_clock")]),
        (
            "NVLink traffic", "Bps",
            [rate("nvlink.received_bytes", "to {{host}}"), rate("nvlink.sent_bytes", "from {{host}}")],
        ),
        ("PCIe lanes", "short", [gauge("pcie.width")]),
        ("CPU", "percent", [gauge("cpu.busy", "{{host}}")]),
        ("Memory", "bytes", [gauge("memory.used", "{{host}}"), gauge("object_store.used", "{{host}} object store")]),
        (
            "Disk", "Bps",
            [rate("disk.read_bytes", "{{host}} read"), rate("disk.written_bytes", "{{host}} written")],
        ),
        (
            "Network", "Bps",
            [rate("network.received_bytes", "{{host}} received"), rate("network.sent_bytes", "{{host}} sent")],
        ),
    ]  # fmt: skip
