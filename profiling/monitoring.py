"""The three files that Prometheus and Grafana read: ``prometheus.yml``, ``alerts.yml``, ``dashboard.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import UserError
from workbench.files import write_atomic
from workbench.runs import Run, Summary

Panel = tuple[str, str, list[tuple[str, str]]]
"""Title, unit, and the queries with their legends."""


def write_files(
    folder: Path, run: Run, scrapes: Sequence[dict[str, Any]], seconds: int, alerts: dict[str, Any],
    board: dict[str, Any],
) -> Summary:  # fmt: skip
    """Write them to ``folder``, to be scraped every so many ``seconds``. Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder: {folder}: {error.strerror}") from None
    every = {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"}
    prometheus = {"global": every, "rule_files": ["alerts.yml"], "scrape_configs": list(scrapes)}
    texts = {
        "prometheus.yml": yaml.safe_dump(prometheus, sort_keys=False),
        "alerts.yml": yaml.safe_dump(alerts, sort_keys=False, width=110),
        "dashboard.json": json.dumps(board, indent=1),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text)
    run.say(f"prometheus --config.file={folder / 'prometheus.yml'}; import {folder / 'dashboard.json'} into Grafana")
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    return {"folder": str(folder), "panels": len(board["panels"]), "alerts": len(rules)}


def ray_targets(discovery: str) -> dict[str, Any]:
    """A scrape config of all that Ray lists in its file of targets.

    The file is a link, so Prometheus is not told of its changes and has to look: by itself it would every five minutes,
    and not see a host that joined until then.
    """
    return {"job_name": "ray", "file_sd_configs": [{"files": [discovery], "refresh_interval": "10s"}]}


def dashboard(name: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """A Grafana dashboard ``workbench NAME``: two panels a row, over the data source that the user picks."""
    source = {"type": "prometheus", "uid": "${source}"}
    drawn = [
        {
            "id": number + 1, "type": "timeseries", "title": title, "datasource": source,
            "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(65 + place), "expr": expr, "legendFormat": legend, "datasource": source}
                for place, (expr, legend) in enumerate(queries)
            ],
        }
        for number, (title, unit, queries) in enumerate(panels)
    ]  # fmt: skip
    return {
        "title": f"workbench {name}", "uid": f"workbench-{name}", "schemaVersion": 39, "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"}, "tags": ["workbench"], "panels": drawn,
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
    }  # fmt: skip
