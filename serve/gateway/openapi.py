"""The API as an OpenAPI document: what clients and property tests read."""

from typing import Any

TEXT = {"type": "string"}
ERROR = {
    "description": "an error in OpenAI's shape",
    "content": {"application/json": {"schema": {
        "type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {"message": TEXT, "type": TEXT},
        }},
    }}},
}  # fmt: skip
GENERATE = {
    "model": TEXT,
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "stream": {"type": "boolean"},
    "user": TEXT,
    "stop": {"oneOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 4}]},
}
MESSAGES = {
    "type": "array", "minItems": 1, "maxItems": 8,
    "items": {
        "type": "object", "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT},
    },
}  # fmt: skip


def _operation(summary: str, properties: dict[str, Any] | None = None, *required: str, key: bool = True) -> Any:
    told: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "the answer"}, "default": ERROR},
    }
    if not key:
        told["security"] = []
    if properties is not None:
        schema = {"type": "object", "properties": properties, "required": list(required)}
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return told


SCHEMA: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "workbench gateway", "version": "1"},
    "security": [{"key": []}],
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "paths": {
        "/health": {"get": _operation("The process lives", key=False)},
        "/ready": {"get": _operation("Some model answers", key=False)},
        "/metrics": {"get": _operation("Prometheus metrics")},
        "/v1/models": {"get": _operation("The models of this key")},
        "/v1/models/{model}": {"get": {
            **_operation("One model"),
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
        }},
        "/v1/chat/completions": {"post": _operation(
            "Answer a conversation", {**GENERATE, "messages": MESSAGES}, "model", "messages"
        )},
        "/v1/completions": {"post": _operation("Continue a text", {**GENERATE, "prompt": TEXT}, "model", "prompt")},
        "/v1/embeddings": {"post": _operation("Embed a text", {"model": TEXT, "input": TEXT}, "model", "input")},
        "/v1/feedback": {"post": _operation(
            "Judge an answer",
            {"request_id": TEXT, "score": {"type": "number", "minimum": -1, "maximum": 1}, "comment": TEXT},
            "request_id", "score",
        )},
    },
}  # fmt: skip
