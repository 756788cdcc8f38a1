"""Secrets stay out of run folders: what looks like one is masked before it is written.

redact({"api_key": "sk-1", "uri": "http://root:Milvus@host:19530"})
# {"api_key": "(secret)", "uri": "http://root:(secret)@host:19530"}
"""

import re
from typing import Any

MASK = "(secret)"
SECRET_KEY = re.compile(r"(^|[_.-])(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)([^/@:\s]*):([^/@\s]+)@")


def redact(value: Any) -> Any:
    """A copy of nested mappings and lists with secret values masked: strings under a key such as ``api_key`` or
    ``token``, and passwords in URLs."""
    if isinstance(value, dict):
        return {
            key: MASK if SECRET_KEY.search(str(key)) and isinstance(inner, str) and inner else redact(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return USER_INFO.sub(rf"\1:{MASK}@", value) if isinstance(value, str) else value


def redact_argument(argument: str) -> str:
    """A command-line argument with a secret override (``api_key=...``) or a password in a URL masked."""
    key, equals, text = argument.partition("=")
    if equals and text and SECRET_KEY.search(key):
        return f"{key}={MASK}"
    return str(redact(argument))
