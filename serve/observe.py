"""Write what Prometheus and Grafana need to watch the gateway and its engines.

    workbench serve observe url=http://system-a:8000 folder=/etc/prometheus/workbench
    prometheus --config.file=/etc/prometheus/workbench/prometheus.yml

``prometheus.yml`` scrapes the gateway (with a key: ``workbench serve keys add prometheus --model /metrics``) and Ray's
agents, which have vLLM's metrics; ``alerts.yml`` has the rules, ``dashboard.json`` is imported into Grafana.
"""

from typing import Any

from pydantic import Field

from profiling.monitoring import Panel, dashboard, ray_targets, write_files
from serve.keys import default_key_file
from workbench.config import Config, OutputPath
from workbench.runs import Run, Summary

PANELS: list[Panel] = [
    ("Requests a second, by model and outcome", "reqps",
     [("sum by (model, outcome) (rate(workbench_requests_total[1m]))", "{{model}} {{outcome}}")]),
    ("Share of requests that failed", "percentunit",
     [('sum by (model) (rate(workbench_requests_total{outcome!~"ok|client_gone|engine_refused"}[5m])) '
       "/ sum by (model) (rate(workbench_requests_total[5m]))", "{{model}}")]),
    ("Time to first token", "s",
     [(f"histogram_quantile({q}, sum by (model, le) (rate(workbench_time_to_first_token_seconds_bucket[5m])))",
       f"{{{{model}}}} p{q * 100:g}") for q in (0.5, 0.95, 0.99)]),
    ("Time a token after the first", "s",
     [(f"histogram_quantile({q}, sum by (model, le) (rate(workbench_inter_token_seconds_bucket[5m])))",
       f"{{{{model}}}} p{q * 100:g}") for q in (0.5, 0.95)]),
    ("Whole answer", "s",
     [(f"histogram_quantile({q}, sum by (model, le) (rate(workbench_request_seconds_bucket[5m])))",
       f"{{{{model}}}} p{q * 100:g}") for q in (0.5, 0.95, 0.99)]),
    ("At the engine, and waiting for it", "short",
     [("sum by (model) (workbench_running)", "{{model}} running"),
      ("sum by (model) (workbench_waiting)", "{{model}} waiting")]),
    ("Wait for a place, p95", "s",
     [("histogram_quantile(0.95, sum by (model, le) (rate(workbench_queue_seconds_bucket[5m])))", "{{model}}")]),
    ("Tokens a second", "short",
     [("sum by (model, kind) (rate(workbench_tokens_total[1m]))", "{{model}} {{kind}}")]),
    ("Tokens a second, by owner of the key", "short",
     [("sum by (owner) (rate(workbench_tokens_total[5m]))", "{{owner}}")]),
    ("Cost an hour, by owner", "short", [("sum by (owner) (rate(workbench_cost_total[1h])) * 3600", "{{owner}}")]),
    ("Power of requests, by model", "watt",
     [("sum by (model) (rate(workbench_energy_wh_total[5m])) * 3600", "{{model}}")]),
    ("Open breakers, retries, fallbacks", "short",
     [("max by (model) (workbench_breaker_open)", "{{model}} open"),
      ("sum by (model) (rate(workbench_retries_total[5m]))", "{{model}} retries/s"),
      ("sum by (model, served) (rate(workbench_fallbacks_total[5m]))", "{{model}} to {{served}}/s")]),
    ("vLLM: requests that run and wait", "short",
     [("sum by (model_name) (ray_vllm_num_requests_running)", "{{model_name}} running"),
      ("sum by (model_name) (ray_vllm_num_requests_waiting)", "{{model_name}} waiting")]),
    ("vLLM: KV cache in use", "percentunit",
     [("max by (model_name) (ray_vllm_kv_cache_usage_perc)", "{{model_name}}")]),
]  # fmt: skip


class ObserveConfig(Config):
    """Where the gateway is, and when to be told."""

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+", description="The gateway, as seen "
                     "from Prometheus")  # fmt: skip
    folder: OutputPath | None = Field(default=None, description="Where the files go; default: the run's artifacts")
    api_key_file: OutputPath | None = Field(default=None, description="File of the key that Prometheus sends")
    ray_discovery: str = Field(
        default="/tmp/ray/prom_metrics_service_discovery.json", description="Ray's list of its agents, on the head"
    )
    interval: int = Field(default=15, ge=1, description="Seconds between two scrapes")
    first_token_seconds: float = Field(default=5.0, gt=0, description="Alert where p95 to the first token is longer")
    failed_share: float = Field(default=0.05, gt=0, lt=1, description="Alert where more of the requests fail")


def run(config: ObserveConfig, run: Run) -> Summary:
    """Write the three files. Raises UserError where the folder cannot be made."""
    folder, board = config.folder or run.artifact("observe"), dashboard("serving", PANELS)
    return write_files(folder, run, scrapes(config), config.interval, alerts(config), board)


def scrapes(config: ObserveConfig) -> list[dict[str, Any]]:
    """What Prometheus asks: the gateway and Ray's agents."""
    scheme, _, rest = config.url.partition("://")
    host, _, prefix = rest.partition("/")
    gateway = {
        "job_name": "gateway",
        "scheme": scheme,
        "metrics_path": "/".join(["", *filter(None, [prefix.strip("/")]), "metrics"]),
        "authorization": {"credentials_file": str(config.api_key_file or default_key_file())},
        "static_configs": [{"targets": [host]}],
    }
    return [gateway, ray_targets(config.ray_discovery)]


def alerts(config: ObserveConfig) -> dict[str, Any]:
    """The alert rules."""

    def rule(name: str, expr: str, minutes: int, severity: str, text: str) -> dict[str, Any]:
        return {"alert": name, "expr": expr, "for": f"{minutes}m", "labels": {"severity": severity},
                "annotations": {"summary": text}}  # fmt: skip

    failed, first = PANELS[1][2][0][0], PANELS[2][2][1][0]
    rules = [
        rule("GatewayDown", 'up{job="gateway"} == 0', 1, "critical", "The gateway does not answer Prometheus."),
        rule("RequestsFail", f"({failed}) > {config.failed_share}", 5, "critical",
             "{{ $labels.model }}: {{ $value | humanizePercentage }} of the requests fail."),
        rule("FirstTokenSlow", f"{first} > {config.first_token_seconds}", 5, "warning",
             "{{ $labels.model }}: p95 to the first token is {{ $value | humanizeDuration }}."),
        rule("BreakerOpen", "max by (model) (workbench_breaker_open) > 0", 1, "critical",
             "{{ $labels.model }}: its engine failed and is not asked."),
        rule("RequestsWait", "sum by (model) (workbench_waiting) > 0", 5, "warning",
             "{{ $labels.model }}: requests wait for a place since five minutes; add a replica."),
        rule("RequestsRefused",
             'sum by (model) (rate(workbench_requests_total{outcome="overloaded"}[5m])) > 0', 5, "warning",
             "{{ $labels.model }}: the queue is full and requests are refused."),
    ]  # fmt: skip
    return {"groups": [{"name": "workbench", "rules": rules}]}
