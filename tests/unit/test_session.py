"""Attaching to a cluster that is named but not there: a message at once, not ten minutes of trying."""

import os
import socket
import time
from pathlib import Path

import pytest

from workbench.errors import UserError
from workbench.files import write_json
from workbench.session import attach


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody listens, and a state folder of the test's own."""
    monkeypatch.setenv("WORKBENCH_STATE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", bool)  # the tests' own Ray may be up by now
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def refusal() -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as error, attach():
        pass
    assert time.monotonic() - began < 60
    return str(error.value)


def test_a_named_cluster_that_does_not_answer_is_told(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    message = refusal()
    assert message.startswith(f"no Ray cluster answers at {nobody}") and message.endswith("which RAY_ADDRESS names")


@pytest.mark.parametrize("address", ["somewhere", "host:", "host:port"])
def test_an_address_that_is_none_is_told(nobody: str, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert "HOST:PORT" in refusal()


def test_a_recorded_head_whose_process_lives_but_does_not_answer_is_told(nobody: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    session = {"gcs": nobody, "dashboard": "http://127.0.0.1:1", "token_file": str(token), "pid": os.getpid()}
    write_json(tmp_path / "cluster.json", session)
    message = refusal()
    assert f"at {nobody}" in message and str(tmp_path / "cluster.json") in message
