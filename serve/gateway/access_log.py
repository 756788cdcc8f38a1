"""One line of JSON for each request: who, which model, how long, how many tokens. No text of prompts unless asked."""

import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

import orjson

from serve.gateway.exchange import Exchange
from workbench.errors import UserError


class PrivateFile(logging.handlers.WatchedFileHandler):
    """A log that is made for its owner alone: it tells who asked what of which model, with ``log_text`` in full."""

    def _open(self) -> Any:
        return open(
            self.baseFilename, "a", encoding=self.encoding, opener=lambda path, flags: os.open(path, flags, 0o600)
        )


def open_log(path: Path | None) -> logging.Logger:
    """The logger of the file, or of stderr. The file may be moved away and is then begun anew.

    Raises UserError for a file that cannot be written.
    """
    logger = logging.getLogger("workbench.gateway.access")
    handler: logging.Handler
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = PrivateFile(path, encoding="utf-8")
        except OSError as error:
            raise UserError(f"gateway.log_file: {path}: {error.strerror}") from None
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


def row(exchange: Exchange) -> dict[str, Any]:
    """What is told of a request; times in milliseconds."""
    return {
        "time": round(exchange.arrived, 3),
        "request_id": exchange.request_id,
        "trace_id": exchange.trace_id,
        "path": exchange.path,
        "owner": exchange.key.owner,
        "key": exchange.key.id,
        "asked": exchange.asked,
        "served": exchange.served,
        "variant_of": exchange.variant_of,
        "fallback_from": exchange.fallback_from,
        "status": exchange.status,
        "error": exchange.error,
        "reason": exchange.reason,
        "attempts": exchange.attempts,
        "queued_ms": _ms(exchange.queued_s),
        "first_token_ms": _ms(exchange.first_token_s),
        "inter_token_ms": _ms(exchange.inter_token_s),
        "total_ms": _ms(exchange.total_s),
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": exchange.completion_tokens,
        "side_tokens": exchange.side_tokens,
        "cost": exchange.cost,
        "energy_wh": exchange.energy_wh,
    }


def write(logger: logging.Logger, exchange: Exchange, texts: bool) -> None:
    """Log a request, with its body and its answer where ``texts``."""
    told = row(exchange)
    if texts:
        told |= {"body": exchange.body, "answer": exchange.answer}
    logger.info(orjson.dumps(told, default=str).decode())


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
