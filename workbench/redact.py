"""Secrets stay out of run folders: what looks like one is masked before it is written.

redact({"api_key": "sk-1", "uri": "http://root:Milvus@host:19530"})
# {"api_key": "(secret)", "uri": "http://root:(secret)@host:19530"}
"""

import re
from typing import Any

import yaml

MASK = "(secret)"
SECRET_KEY = re.compile(r"(^|[_.-])(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=:/)(/?[^/@:\s\"<>]*):([^/\s\"<>]+)@")
"""User and password of a URL: all up to the last ``@`` of its host part, for a password may hold one that should have
been written ``%40``. A URL that was taken for a path has lost one of its slashes."""


def redact(value: Any) -> Any:
    """A copy of nested mappings and lists with secret values masked: strings under a key such as ``api_key`` or
    ``token``, and passwords in URLs."""
    if isinstance(value, dict):
        return {key: _masked(inner) if SECRET_KEY.search(str(key)) else redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return USER_INFO.sub(rf"\1:{MASK}@", value) if isinstance(value, str) else value


def _masked(value: Any) -> Any:
    """What stands under a secret key: its strings masked, alone or in a list; numbers are counts of something."""
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return (MASK if value else value) if isinstance(value, str) else redact(value)


def redact_argument(argument: str) -> str:
    """A command-line argument with a secret override (``api_key=...``, ``models=[{api_key: ...}]``) or a password in a
    URL masked."""
    key, equals, text = argument.partition("=")
    if equals and text and SECRET_KEY.search(key):
        return f"{key}={MASK}"
    if equals and text.lstrip()[:1] in ("{", "["):
        try:
            given = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            given = None
        if redact(given) != given:
            return f"{key}={yaml.safe_dump(redact(given), default_flow_style=True, width=10**6).strip()}"
    return str(redact(argument))
