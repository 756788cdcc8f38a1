"""What every client of an OpenAI-compatible endpoint shares: where it is, its key, its models and their limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from serve.keys import client_key
from workbench.errors import Failure, UserError

if TYPE_CHECKING:
    import openai

DEFAULT_URL = "http://127.0.0.1:8000/v1"
UNKNOWN_CONTEXT = 4096


def open_client(base_url: str, api_key_file: Path | None, timeout: float) -> "openai.OpenAI":
    """The OpenAI client for ``base_url``. Raises UserError if there is no key."""
    import openai

    return openai.OpenAI(base_url=base_url, api_key=client_key(api_key_file), timeout=timeout, max_retries=0)


def served_models(client: "openai.OpenAI") -> dict[str, int | None]:
    """The endpoint's models with their context length in tokens where it is told.

    Raises UserError if nothing answers there or the key is refused, Failure for any other answer.
    """
    import openai

    try:
        models = list(client.models.list())
    except openai.AuthenticationError:
        raise UserError(f"{client.base_url} refused the API key: give api_key_file=PATH of its key") from None
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise UserError(
            f"nothing answers at {client.base_url} ({reason}): start it with 'workbench serve up'"
        ) from None
    except openai.APIError as error:
        raise Failure(f"{client.base_url}models answered: {error}") from None
    return {model.id: _context_length(model) for model in models}


def _context_length(model: object) -> int | None:
    # ray.serve.llm tells it in its metadata, plain vLLM as max_model_len, OpenAI not at all
    metadata = getattr(model, "metadata", None) or {}
    return metadata.get("max_request_context_length") or getattr(model, "max_model_len", None)


def choose_model(served: dict[str, int | None], wanted: str | None) -> str:
    """``wanted``, or the endpoint's last model. Raises UserError if it is not served."""
    if wanted is None:
        return list(served)[-1]
    if wanted not in served:
        raise UserError(f"model '{wanted}' is not served; there are: {', '.join(served)}")
    return wanted


def count_tokens(client: "openai.OpenAI", model: str, text: str) -> int:
    """Tokens of ``text``: the server's own count, or one per three characters where it has no ``/tokenize``."""
    answer = _tokenize(client, model, text)
    return int(answer["count"]) if answer else len(text) // 3 + 1


def context_length(client: "openai.OpenAI", model: str) -> int:
    """The model's context in tokens, as its listing or ``/tokenize`` tells it, else a cautious 4096."""
    told = served_models(client)[model]
    if told is None and (answer := _tokenize(client, model, "x")):
        told = answer.get("max_model_len")
    return told or UNKNOWN_CONTEXT


def _tokenize(client: "openai.OpenAI", model: str, text: str) -> dict[str, Any] | None:
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    answer = httpx.post(
        f"{root}/tokenize",
        json={"model": model, "prompt": text},
        headers={"Authorization": f"Bearer {client.api_key}"},
        timeout=30,
    )
    return dict(answer.json()) if answer.status_code == 200 else None
