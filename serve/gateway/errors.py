"""What the gateway answers when it does not answer: OpenAI's error shape, whatever went wrong."""

import math
from dataclasses import dataclass, field
from typing import Any

import orjson

JSON = (b"content-type", b"application/json")


@dataclass
class ApiError(Exception):
    """A refusal or a fault, with its HTTP status and OpenAI's ``type`` and ``code``.

    ``retry_after`` is in seconds; ``kind`` is its name in metrics and logs; ``again`` says that another attempt at the
    same engine may succeed, ``counted`` that metrics and logs know of it.
    """

    status: int
    message: str
    kind: str
    type: str = "invalid_request_error"
    param: str | None = None
    retry_after: float | None = None
    again: bool = False
    counted: bool = False
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def body(self) -> bytes:
        """The JSON object."""
        return orjson.dumps({"error": self.fields()})

    def fields(self) -> dict[str, Any]:
        """The inner object of the JSON."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.kind}

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The response's headers, Retry-After in whole seconds."""
        found = [JSON, *self.headers]
        if self.retry_after is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        return found


def wrong_key() -> ApiError:
    """401: no key, or one that is not known."""
    message = "Incorrect API key provided. Send the key of this endpoint as 'Authorization: Bearer KEY'."
    return ApiError(401, message, "invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])


def model_forbidden(model: str) -> ApiError:
    """403: the key may not use the model."""
    return ApiError(403, f"This key may not use the model '{model}'.", "model_not_allowed", "permission_error", "model")


def model_unknown(model: str) -> ApiError:
    """404: there is no such model."""
    return ApiError(404, f"The model '{model}' does not exist.", "model_not_found", param="model")


def no_route(path: str) -> ApiError:
    """404: there is no such path."""
    return ApiError(404, f"There is nothing at {path}.", "not_found")


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: the request is wrong."""
    return ApiError(400, message, "bad_request", param=param)


def store_down() -> ApiError:
    """503: keys and limits cannot be looked up."""
    message = "The store of keys does not answer."
    return ApiError(503, message, "store_unavailable", "server_error", retry_after=5.0)


def over_limit(message: str, retry_after: float, kind: str = "rate_limit_exceeded") -> ApiError:
    """429: the key has used what it may."""
    return ApiError(429, message, kind, "rate_limit_error", retry_after=retry_after)


def overloaded(model: str, why: str, retry_after: float = 1.0) -> ApiError:
    """503: the model takes no more work now."""
    return ApiError(503, f"The model '{model}' is overloaded: {why}.", "overloaded", "overloaded_error",
                    retry_after=retry_after)  # fmt: skip


def breaker_open(model: str, retry_after: float) -> ApiError:
    """503: the model's last requests failed."""
    message = f"The model '{model}' is not available: its last requests failed."
    return ApiError(503, message, "breaker_open", "server_error", retry_after=retry_after)


def unavailable(model: str) -> ApiError:
    """503: the model's engine cannot be reached, or failed before it answered. Why is in the log."""
    message = f"The model '{model}' is not available."
    return ApiError(503, message, "engine_unavailable", "server_error", retry_after=5.0, again=True)


def timed_out(model: str, what: str, seconds: float) -> ApiError:
    """504: the engine took too long."""
    message = f"The model '{model}' gave no {what} within {seconds:g} s."
    return ApiError(504, message, "timeout", "server_error", retry_after=5.0)


def cut(model: str) -> ApiError:
    """502: the engine ended in the middle of its answer."""
    return ApiError(
        502, f"The answer of '{model}' was cut off.", "answer_cut", "server_error", retry_after=1.0, again=True
    )
