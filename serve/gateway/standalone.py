"""The gateway alone, before OpenAI-compatible servers that run already: no Ray, no GPU, one process.

    workbench serve gateway configs/serve/gateway.yaml

The models are those of ``gateway.upstreams``. Ctrl-C or SIGTERM lets the answers in flight end, then stops.
"""

import asyncio
import contextlib
import math
import socket

from pydantic import Field

from serve.gateway.app import Gateway
from serve.gateway.checks import check_settings
from serve.gateway.own_key import own_key
from serve.gateway.settings import GatewayConfig
from serve.keys import default_key_file, make_key
from workbench.config import Config, OutputPath
from workbench.errors import UserError
from workbench.runs import Run, Summary

LARGEST_HEAD = 64 << 10
"""Bytes of a request's line and headers; past them the connection is closed."""


class StandaloneConfig(Config):
    """What to listen on, and the gateway."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(default=8080, ge=1, le=65535, description="Port to listen on")
    gateway: GatewayConfig = Field(description="Models (upstreams), limits, fallbacks, records")
    api_key_file: OutputPath | None = Field(
        default=None, description="File of the operator's key, made if absent; default RUNS/.secrets/serve_key"
    )


def check(config: StandaloneConfig) -> None:
    """Raise UserError where there is nothing to stand before, or the settings name what is not there."""
    if not config.gateway.upstreams:
        raise UserError("gateway.upstreams: name the servers to stand before: {NAME: {base_url: http://HOST:8000/v1}}")
    check_settings(config.gateway, ())


def run(config: StandaloneConfig, run: Run) -> Summary:
    """Serve until stopped."""
    check(config)
    key_file = config.api_key_file or default_key_file()
    asyncio.run(own_key(config.gateway, make_key(key_file)))
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
        url = f"http://{config.host}:{config.port}/v1"
        run.say(f"gateway before {', '.join(config.gateway.upstreams)} at {url}  (key in {key_file}); Ctrl-C stops it")
        with contextlib.suppress(KeyboardInterrupt):  # the ordinary end of a server, not an interrupted run
            serve(config.gateway, listener)
    return {"url": url, "models": ", ".join(config.gateway.upstreams)}


def serve(settings: GatewayConfig, listener: socket.socket) -> None:
    """Answer on ``listener`` until a signal, then drain. Raises UserError for what cannot be opened."""
    import uvicorn

    gateway = Gateway(None, settings)
    _ = gateway.state
    server = uvicorn.Server(
        uvicorn.Config(
            gateway, log_level="warning", access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds), h11_max_incomplete_event_size=LARGEST_HEAD,
            http="h11",
        )
    )  # fmt: skip
    server.run(sockets=[listener])
