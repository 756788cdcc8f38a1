"""A served model under load while its engine, its replica and the gateway are killed: what clients see, how long it
takes to come back. Minutes: ``make soak``."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from models import make_tiny_llama

from serve import availability, down, up
from serve.keys import default_key_file, read_key
from workbench.config import load
from workbench.runs import open_run

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(availability.available() is not None, reason=str(availability.available())),
]
CLIENT_SECONDS = 30.0
RECOVERY_SECONDS = 240.0


def opened(name: str, config: Any) -> Any:
    with open_run("serve", name, config) as run:
        return run


@pytest.fixture(scope="module")
def endpoint(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One small model behind two gateway processes with short time-outs."""
    root = tmp_path_factory.mktemp("kill")
    model = make_tiny_llama(root / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RUNS_ROOT", str(root / "runs"))
        policy = "{first_token_timeout: 10, timeout: 20, breaker_seconds: 2, queue_timeout: 5}"
        config = load(
            up.ServeConfig, None,
            [f"models=[{{name: tiny, source: '{model}', device: cpu}}]", f"port={port}", "timeout=540",
             f"gateway={{replicas: 2, defaults: {policy}}}"],
        )  # fmt: skip
        summary = up.run(config, opened("up", config))
        try:
            yield summary["url"]
        finally:
            down.run(down.DownConfig(), opened("down", down.DownConfig()))


class Load:
    """Four clients that ask one after the other and count what they get."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        headers = {"Authorization": f"Bearer {read_key(default_key_file())}"}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "stream": True,
                "ignore_eos": True}  # fmt: skip
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                told = httpx.post(f"{self._url}/chat/completions", json=body, headers=headers, timeout=CLIENT_SECONDS)
                self.outcomes[outcome(told)] += 1
            except httpx.TransportError as error:
                self.outcomes[type(error).__name__] += 1
            self.longest = max(self.longest, time.monotonic() - begun)
            time.sleep(0.05)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def outcome(answer: httpx.Response) -> str:
    """ok, the code of an error of the gateway, or the bare status of one that is not."""
    if answer.status_code == 200:
        if answer.text.rstrip().endswith("data: [DONE]") and '"error"' not in answer.text:
            return "ok"
        last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
        return str(json.loads(last.removeprefix("data: "))["error"]["code"])
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(answer.json()["error"]["code"])
    return f"HTTP {answer.status_code}"


def killed(title: str) -> None:
    """SIGKILL to one of our descendants whose command line begins so."""
    seen = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append(" ".join(process.cmdline()))
            if seen[-1].startswith(title):
                process.kill()
                return
    raise AssertionError(f"there is no {title} among {[title for title in seen if '::' in title]}")


def until(true: Callable[[], bool], seconds: float) -> float:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not come true"
        time.sleep(0.1)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "title",
    ["VLLM::EngineCore", "ray::ServeReplica:workbench:chat", "ray::ServeReplica:workbench:OpenAiIngress"],
)
def test_what_is_killed_comes_back_and_every_request_is_answered_in_time(endpoint: str, title: str) -> None:
    with Load(endpoint) as load_:
        until(lambda: load_.outcomes["ok"] > 20, RECOVERY_SECONDS)
        killed(title)
        before = load_.outcomes["ok"]
        time.sleep(1)
        recovered = until(lambda: load_.outcomes["ok"] > before + 20, RECOVERY_SECONDS)
    print(f"{title}: {recovered:.1f} s to twenty good answers, longest request {load_.longest:.1f} s, "
          f"{dict(load_.outcomes)}")  # fmt: skip
    assert load_.longest < CLIENT_SECONDS
    assert "ReadTimeout" not in load_.outcomes


def test_the_key_still_works_after_all_of_it(endpoint: str) -> None:
    assert (Path(default_key_file()).parent / "gateway.db").is_file()
    headers = {"Authorization": f"Bearer {read_key(default_key_file())}"}
    assert httpx.get(f"{endpoint}/models", headers=headers).status_code == 200
