"""The OpenAI-compatible front of all models: Ray's own ingress under the gateway.

``ray.serve.llm`` has no keys, limits, breaker or fallback. The gateway is an ASGI middleware of the ingress' FastAPI
app, outermost: no extra hop, and a request that it refuses reaches no route, no parser and no model.
"""

import time
from typing import TYPE_CHECKING, Any

from serve.application import APPLICATION
from serve.gateway.app import Gateway
from serve.gateway.metrics import SHARED_FOLDER
from serve.gateway.settings import GatewayConfig

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError
    from ray.serve import Application
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    from serve.engine import Served

NODE = "ray.io/node-id"
"""Ray's own label of each node."""
HEALTH_SECONDS = 1.0
"""What Serve says of its deployments is believed for so long."""


class Deployments:
    """Which models have a running replica, as Serve knows it. ``base`` gives the deployment's model of each name."""

    def __init__(self, base: dict[str, str]) -> None:
        self._base = base
        self._running: set[str] = set()
        self._asked_at = 0.0

    def __call__(self, model: str) -> bool:
        """Whether a replica of ``model`` runs."""
        from ray import serve

        if time.monotonic() - self._asked_at > HEALTH_SECONDS:
            found = serve.status().applications[APPLICATION].deployments
            self._running = {
                name.split(":", 1)[-1]
                for name, deployment in found.items()
                if deployment.status != "UNHEALTHY" and deployment.replica_states.get("RUNNING", 0)
            }
            self._asked_at = time.monotonic()
        return self._base.get(model) in self._running


async def openai_error(request: "Request", error: "HTTPException") -> "Response":
    """An HTTP error of the ingress (unknown model, unknown route) in OpenAI's shape; its own says ``detail``."""
    return _error(error.status_code, str(error.detail), None)


async def invalid_request(request: "Request", error: "RequestValidationError") -> "Response":
    """A body that is no valid request: 400 with the place and the reason.

    Ray's own handler also echoes the offending value, and answers 500 where that is no JSON (NaN).
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return _error(400, f"Invalid request: {first['msg']}" + (f" (at {place})" if place else ""), place or None)


def _error(status: int, message: str, param: str | None) -> "Response":
    from starlette.responses import JSONResponse

    body = {"message": message, "type": "invalid_request_error", "param": param, "code": status}
    return JSONResponse({"error": body}, status_code=status)


def build_application(models: "list[Served]", settings: GatewayConfig, ingress_cpus: float) -> "Application":
    """A Serve application: one vLLM deployment per model behind one OpenAI ingress under the gateway.

    Follows ``build_openai_app`` of ray.serve.llm 2.60, which takes no FastAPI app of one's own. An adapter is a name
    of its own for the same deployment.
    """
    from fastapi.exceptions import RequestValidationError
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.llm._internal.serve.core.ingress.ingress import init
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
    from starlette.exceptions import HTTPException

    names = [(name, model) for model in models for name in (model.name, *model.adapters)]
    base = {name: model.name for name, model in names}
    app = init()
    app.add_exception_handler(HTTPException, openai_error)
    app.add_exception_handler(RequestValidationError, invalid_request)
    # added last, so it runs first
    app.add_middleware(Gateway, settings=settings, healthy=Deployments(base), base=base)
    options: dict[str, Any] = OpenAiIngress.get_deployment_options([model.config for model in models])
    options["ray_actor_options"] = {"num_cpus": ingress_cpus}
    options["graceful_shutdown_timeout_s"] = settings.drain_seconds
    if settings.store.startswith("sqlite:"):  # its file is on this host
        import ray

        options["ray_actor_options"]["label_selector"] = {NODE: ray.get_runtime_context().get_node_id()}
    if settings.replicas > 1:
        options["autoscaling_config"] |= {"min_replicas": settings.replicas, "max_replicas": settings.replicas}
        shared = str(settings.metrics_folder())
        options["ray_actor_options"]["runtime_env"] = {"env_vars": {SHARED_FOLDER: shared}}
    return serve.deployment(make_fastapi_ingress(OpenAiIngress, app=app), **options).bind(
        llm_deployments={name: model.deployment for name, model in names},
        model_cards={name: to_model_metadata(name, model.config) for name, model in names},
    )
