"""Requests and feedback kept in Parquet, where the operator has asked for it: what A/B reports and replays read.

``requests-*.parquet`` has a row a request that its key's limits let in, also where the model's queue or breaker refused
it, with body and answer only where texts are kept, and those redacted; ``feedback-*.parquet`` a row a verdict. A file
is written whole and renamed; what waits for the next file (at most ``flush_seconds``) is lost with a process that is
killed. Where a file cannot be written its rows wait for the next try.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from pathlib import Path
from typing import Any

import orjson

from data_pipelines.pii import redact_parts
from serve.gateway.access_log import row
from serve.gateway.exchange import Body, Exchange
from serve.gateway.settings import RecordConfig

BATCH = 1000
MOST = 100 * BATCH
"""Rows that wait at most while no file can be written; the oldest are lost first."""
log = logging.getLogger("workbench.gateway")


class Recorder:
    """The rows that wait for their file."""

    def __init__(self, config: RecordConfig) -> None:
        assert config.folder is not None
        self._config = config
        self._folder = config.folder
        self._waiting: dict[str, list[dict[str, Any]]] = {"requests": [], "feedback": []}
        self._timer: asyncio.Task[None] | None = None
        self._full = asyncio.Event()
        self._writing = asyncio.Lock()

    def request(self, exchange: Exchange) -> None:
        """Keep a request that has ended."""
        told = row(exchange) | {"user": exchange.user}
        told["body"] = exchange.body if self._config.text else None
        told["answer"] = exchange.answer if self._config.text else None
        self._add("requests", told)

    def feedback(self, request_id: str, score: float, comment: str, owner: str) -> None:
        """Keep a verdict."""
        self._add("feedback", {"time": time.time(), "request_id": request_id, "score": score, "comment": comment,
                               "owner": owner})  # fmt: skip

    def _add(self, kind: str, told: dict[str, Any]) -> None:
        self._waiting[kind].append(told)
        if len(self._waiting[kind]) % BATCH == 0:
            self._full.set()
        if self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._flush_all())

    async def _flush_all(self) -> None:
        """Write a file after each ``flush_seconds``, or sooner when there is much, until nothing waits."""
        while any(self._waiting.values()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._config.flush_seconds)
            self._full.clear()
            await self.flush()

    async def flush(self) -> None:
        """Write what waits."""
        async with self._writing:
            for kind in self._waiting:
                rows, self._waiting[kind] = self._waiting[kind], []
                if not rows:
                    continue
                try:
                    await asyncio.to_thread(self._write, kind, rows)
                except OSError as error:
                    log.error("%d %s wait: %s", len(rows), kind, error)
                    self._waiting[kind] = (rows + self._waiting[kind])[-MOST:]
                except Exception:
                    log.exception("%d %s are lost", len(rows), kind)

    def _write(self, kind: str, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        clean = [self._clean(told) for told in rows]
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{kind}-{time.time_ns()}-{uuid.uuid4().hex[:8]}.parquet"
        hidden = self._folder / f".{name}"
        pq.write_table(pa.Table.from_pylist(clean, SCHEMAS[kind]()), hidden)
        hidden.chmod(0o600)
        hidden.rename(self._folder / name)

    def _clean(self, told: dict[str, Any]) -> dict[str, Any]:
        """A row without personal data; the row given stays as it is, for it may be written again."""
        told = dict(told)
        if told.get("body") is not None:
            told["body"], told["answer"] = self._redacted(told["body"], told["answer"])
        for name in ("comment", "reason", "user"):
            if text := told.get(name):
                told[name] = redact_parts([text], self._config.redact)[0][0]
                if name == "user" and told[name] != text:  # users must stay apart from each other
                    told[name] += f"-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return told

    def _redacted(self, body: Body, answer: str | None) -> tuple[str, str]:
        """Body (as JSON) and answer without personal data, in every text of theirs."""
        texts: list[str] = []
        _walk(body, texts.append)
        clean = iter(redact_parts([*texts, answer or ""], self._config.redact)[0])
        swapped = _walk(body, lambda _: next(clean))
        return orjson.dumps(swapped).decode(), next(clean)


def _walk(value: Any, change: Any) -> Any:
    """``value`` with each text in it, but not the names of its fields, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(each, change) for each in value]
    if isinstance(value, dict):
        return {name: _walk(each, change) for name, each in value.items()}
    return value


def _requests_schema() -> Any:
    import pyarrow as pa

    texts = [
        "request_id", "trace_id", "path", "owner", "key", "asked", "served", "variant_of", "fallback_from", "error",
        "reason", "user", "body", "answer",
    ]  # fmt: skip
    floats = ["time", "queued_ms", "first_token_ms", "inter_token_ms", "total_ms", "cost", "energy_wh"]
    whole = ["status", "attempts", "prompt_tokens", "completion_tokens", "side_tokens"]
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [(name, pa.float64()) for name in floats]
        + [(name, pa.int64()) for name in whole]
    )


def _feedback_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [("time", pa.float64()), ("request_id", pa.string()), ("score", pa.float64()), ("comment", pa.string()),
         ("owner", pa.string())]
    )  # fmt: skip


SCHEMAS = {"requests": _requests_schema, "feedback": _feedback_schema}


def read_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of ``kind`` (requests or feedback) in a folder, oldest first; a column that a file lacks is None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{kind}-*.parquet"))
    if not files:
        return []
    tables = [pq.read_table(file) for file in files]
    return list(pa.concat_tables(tables, promote_options="default").to_pylist())
