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
TEXTS = {"oneOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}]}
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
TOOLS = {
    "type": "array", "maxItems": 4,
    "items": {
        "type": "object", "required": ["type", "function"],
        "properties": {
            "type": {"enum": ["function"]},
            "function": {"type": "object", "required": ["name"], "properties": {"name": TEXT, "description": TEXT}},
        },
    },
}  # fmt: skip
CHAT = {**GENERATE, "messages": MESSAGES, "tools": TOOLS}
RAG = {
    "type": "object",
    "properties": {
        "mode": {"enum": ["dense", "keywords", "hybrid"]},
        "queries": {"type": "integer", "minimum": 1, "maximum": 8},
    },
}
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 16}
JSON = "application/json"


def _operation(
    summary: str, properties: dict[str, Any] | None = None, *required: str, key: bool = True, media: str = JSON
) -> Any:
    told: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "the answer"}, "default": ERROR},
    }
    if not key:
        told["security"] = []
    if properties is not None:
        schema = {"type": "object", "properties": properties, "required": list(required)}
        told["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
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
        "/v1/chat/completions": {"post": _operation("Answer a conversation", CHAT, "model", "messages")},
        "/v1/completions": {"post": _operation("Continue a text", {**GENERATE, "prompt": TEXT}, "model", "prompt")},
        "/v1/embeddings": {"post": _operation("Embed a text", {"model": TEXT, "input": TEXT}, "model", "input")},
        "/v1/score": {"post": _operation(
            "Score texts against one", {"model": TEXT, "text_1": TEXTS, "text_2": TEXTS}, "model", "text_1", "text_2"
        )},
        "/v1/rag/chat/completions": {"post": _operation(
            "Answer a conversation over the documents", {**CHAT, "rag": RAG}, "model", "messages"
        )},
        "/v1/audio/transcriptions": {"post": _operation(
            "Write down what is said", {"model": TEXT, "file": {"type": "string", "format": "binary"}},
            "model", "file", media="multipart/form-data",
        )},
        "/tokenize": {"post": _operation("Tokens of a text", {"model": TEXT, "prompt": TEXT}, "model", "prompt")},
        "/detokenize": {"post": _operation("Text of tokens", {"model": TEXT, "tokens": NUMBERS}, "model", "tokens")},
        "/v1/feedback": {"post": _operation(
            "Judge an answer",
            {"request_id": TEXT, "score": {"type": "number", "minimum": -1, "maximum": 1}, "comment": TEXT},
            "request_id", "score",
        )},
    },
}  # fmt: skip
