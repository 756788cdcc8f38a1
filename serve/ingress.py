"""The OpenAI-compatible front of all models: Ray's own ingress with a key check before everything else.

``ray.serve.llm`` has no server-side API keys, so the check is an ASGI middleware of the ingress' FastAPI app,
outermost: no extra hop, and a request without the key reaches no route, no parser and no model.
"""

import hmac
from typing import TYPE_CHECKING, Any

from serve.keys import digest

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError
    from ray.serve import Application
    from ray.serve.llm import LLMConfig
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health"})
"""What is answered without a key: liveness only, it tells nothing about the models."""


class RequireKey:
    """ASGI middleware: a request whose bearer token does not hash to ``key_sha256`` gets 401 in OpenAI's shape."""

    def __init__(self, app: "ASGIApp", key_sha256: str) -> None:
        self.app = app
        self.key_sha256 = key_sha256

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass the lifespan events, the open paths and requests with the key; refuse the rest."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _path(scope) in OPEN_PATHS):
            await self.app(scope, receive, send)
            return
        if self._authorized(scope["headers"]):
            # the replicas are sent the request's headers; the key ends here
            scope["headers"] = [(n, v) for n, v in scope["headers"] if n.lower() != b"authorization"]
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await _unauthorized()(scope, receive, send)

    def _authorized(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].decode("latin-1").partition(" ")
        # both sides are digests of one length, so the comparison's time tells nothing about the key
        return scheme.lower() == "bearer" and hmac.compare_digest(digest(token.strip()), self.key_sha256)


def _path(scope: "Scope") -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _unauthorized() -> "ASGIApp":
    from starlette.responses import JSONResponse

    error = {
        "message": "Incorrect API key provided. Send the key of this endpoint as 'Authorization: Bearer KEY'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    return JSONResponse({"error": error}, status_code=401, headers={"WWW-Authenticate": "Bearer"})


async def health() -> dict[str, str]:
    """Liveness of the ingress; says nothing about the models."""
    return {"status": "ok"}


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


def build_application(llm_configs: "list[LLMConfig]", key_sha256: str, ingress_cpus: float) -> "Application":
    """A Serve application: one vLLM deployment per config behind one key-guarded OpenAI ingress.

    Follows ``build_openai_app`` of ray.serve.llm 2.60, which takes no FastAPI app of one's own.
    """
    from fastapi.exceptions import RequestValidationError
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.llm._internal.serve.core.ingress.ingress import init
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
    from starlette.exceptions import HTTPException

    app = init()
    app.get("/health")(health)
    app.add_exception_handler(HTTPException, openai_error)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_middleware(RequireKey, key_sha256=key_sha256)  # added last, so it runs first
    options: dict[str, Any] = OpenAiIngress.get_deployment_options(llm_configs)
    options["ray_actor_options"] = {"num_cpus": ingress_cpus}
    return serve.deployment(make_fastapi_ingress(OpenAiIngress, app=app), **options).bind(
        llm_deployments={c.model_id: build_llm_deployment(c) for c in llm_configs},
        model_cards={c.model_id: to_model_metadata(c.model_id, c) for c in llm_configs},
    )
