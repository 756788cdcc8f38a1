"""The API key of the endpoint: one random token in a file that its owner alone can read.

The server is given the key's SHA-256, never the key, so neither Ray's metadata nor a run folder holds the secret.
"""

import hashlib
import os
import secrets
import stat
from pathlib import Path

from workbench.config import environment, runs_root
from workbench.errors import UserError

PREFIX = "wb-"


def default_key_file() -> Path:
    """``<runs root>/.secrets/serve_key``: beside the runs and in none of them, the same for a job and its client."""
    return runs_root() / ".secrets" / "serve_key"


def make_key(path: Path) -> str:
    """The key in ``path``; a file that does not exist is created 0600 with a new random key.

    Raises UserError if others may read the file or it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(path)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(PREFIX + secrets.token_urlsafe(32) + "\n")
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in ``path``. Raises UserError if it is missing, empty or readable by others."""
    try:
        key = path.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise UserError(
            f"cannot read the API key file {path}: {error.strerror}; 'workbench serve up' makes it"
        ) from None
    if mode & 0o077:
        raise UserError(f"the API key file {path} is readable by others (mode {mode:04o}): chmod 600 {path}")
    if not key or any(c.isspace() or not c.isprintable() for c in key):
        raise UserError(f"the API key file {path} holds no key: delete it and 'workbench serve up' makes a new one")
    return key


def client_key(path: Path | None) -> str:
    """The key a client sends: from ``path``, else ``OPENAI_API_KEY``, else the file that ``serve up`` made."""
    if path is not None:
        return read_key(path)
    return environment("OPENAI_API_KEY") or read_key(default_key_file())


def digest(key: str) -> str:
    """SHA-256 of the key, in hex. A random 256-bit key needs no salt."""
    return hashlib.sha256(key.encode()).hexdigest()
