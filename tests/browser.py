"""A headless Chromium, driven over its own protocol (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from gateways import free_port

SECONDS = 60


def chromium() -> str | None:
    """Where Chromium is, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (told := json.loads(self._socket.recv(SECONDS))).get("id") != self._number:
            pass
        assert "error" not in told, told
        return told["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + SECONDS
        while not (found := self.js(expression)):
            assert time.monotonic() < deadline, f"{expression}: {self.js('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def opened(url: str, width: int = 900, height: int = 700) -> Iterator[Page]:
    """The page at ``url`` in a Chromium of its own."""
    from websockets.sync.client import connect

    program, port = chromium(), free_port()
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
             f"--remote-debugging-port={port}", f"--window-size={width},{height}", url],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + SECONDS
            tabs: list[Any] = []
            while not tabs:
                assert time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.1)
                with contextlib.suppress(httpx.HTTPError):
                    found = httpx.get(f"http://127.0.0.1:{port}/json").json()
                    tabs = [tab for tab in found if tab["type"] == "page" and tab["url"].startswith(url)]
            with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()
