"""Show what ``serve up`` deployed on this cluster and whether each model answers a real request now."""

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from serve.application import address, deployed
from serve.keys import client_key
from serve.up import first_answer
from workbench.config import Config
from workbench.errors import Failure
from workbench.runs import Run, Summary
from workbench.session import attach


class StatusConfig(Config):
    """How to ask."""

    api_key_file: Path | None = Field(default=None, description="File of the API key; default the key of 'serve up'")
    timeout: float = Field(default=30.0, gt=0, description="Seconds for each model's answer")


def run(config: StatusConfig, run: Run) -> Summary:
    """One line a model: its replicas, and the seconds a completion of one token took or why there was none."""
    with attach() as attached:
        application, listening = (deployed(), address()) if attached else (None, None)
    if application is None or listening is None:
        run.say("nothing is served by this checkout on this cluster" if attached else "no cluster runs here")
        return {"status": "down"}
    base_url = f"http://{listening[0]}:{listening[1]}{application.route_prefix.rstrip('/')}/v1"
    key = client_key(config.api_key_file)
    rows: list[dict[str, Any]] = []
    for name, deployment in application.models().items():
        row: dict[str, Any] = {"model": name, "replicas": len(deployment["replicas"]), "answers": True, "detail": ""}
        try:
            role: Any = application.roles()[name]
            seconds = first_answer(base_url, key, name, role, time.monotonic() + config.timeout)
            row["detail"] = f"{seconds:.2f} s for a {'vector' if role == 'embedding' else 'token'}"
        except Failure as failure:
            row |= {"answers": False, "detail": str(failure)}
        rows.append(row)
        run.say(
            f"{name}: {row['replicas']} replicas, {'answers' if row['answers'] else 'DOES NOT ANSWER'}, {row['detail']}"
        )
    run.report.table("Models", rows)
    return {
        "status": application.status.lower(),
        "url": base_url,
        "models": len(rows),
        "answering": sum(row["answers"] for row in rows),
    }
