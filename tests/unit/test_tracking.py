"""Metrics: the same rows in metrics.jsonl, TensorBoard and W&B, with no account, no network and no prompt."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from kills import wait_until

from workbench.tracking import WANDB_IDENTITY, Tracker, read_metrics, wandb_mode


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave W&B out where a test is about something else: it takes seconds to start."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.usefixtures("no_wandb")
def test_rows_reach_the_lines_file_in_order(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(3):
        tracker.log(step, loss=1.0 / (step + 1))
    tracker.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


@pytest.mark.usefixtures("no_wandb")
def test_rows_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, loss=2.0)
    assert read_metrics(tmp_path)[0]["loss"] == 2.0
    tracker.close()


@pytest.mark.usefixtures("no_wandb")
def test_rows_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path)
    tracker.log(7, loss=0.25)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25)]


@pytest.mark.usefixtures("no_wandb")
@pytest.mark.timeout(60)
def test_a_disk_that_is_full_for_a_while_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path)
    with files_of_at_most(1000):
        for step in range(100):
            tracker.log(step, loss=0.25)
    tracker.log(100, loss=0.25)
    tracker.close()
    kept = [row["step"] for row in read_metrics(tmp_path)]
    assert kept == [*range(len(kept) - 1), 100]
    metrics, board = capsys.readouterr().err.splitlines()
    assert metrics == f"{tmp_path / 'metrics.jsonl'} takes no rows at present: File too large"
    assert board == "TensorBoard takes no more metrics: [Errno 27] File too large"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [event.step for event in events.Scalars("loss")]
    assert shown == list(range(len(shown)))


@pytest.mark.usefixtures("no_wandb")
def test_a_run_goes_on_without_the_writers_that_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("tensorboard", "wandb"):
        (tmp_path / name).write_text("no folder")
    tracker = Tracker(tmp_path)
    tracker.log(1, loss=0.25)
    tracker.close()
    assert read_metrics(tmp_path)[0]["loss"] == 0.25
    told = [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"{name} did not start, this run goes on without it" for name in ("TensorBoard", "W&B")]


def test_rows_reach_an_offline_wandb_run(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, loss=0.25)
    tracker.close({"best": 0.25})
    [offline] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    wait_until(lambda: b"loss" in offline.read_bytes(), 60, "W&B's process has written the row")


def test_a_run_that_is_begun_again_is_the_same_run_in_wandb(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = Tracker(tmp_path, first_step=step)
        tracker.log(step, loss=0.25)
        tracker.close()
    identity = json.loads((tmp_path / WANDB_IDENTITY).read_text())
    assert identity["name"] == tmp_path.name
    offline = [file.stem for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert offline == [f"run-{identity['id']}"] * 2


@pytest.mark.usefixtures("no_wandb")
def test_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, loss=math.nan, scale=math.inf)
    tracker.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["scale"]) == (None, None)


def test_a_value_that_is_no_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not convert"):
        Tracker(tmp_path).log(1, loss="low")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_metrics_writes_nothing(tmp_path: Path) -> None:
    Tracker(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_wandb_is_offline_without_a_key(no_account: Path) -> None:
    assert wandb_mode() == "offline"


def test_wandb_is_online_with_a_key(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"


@pytest.mark.parametrize(
    ("base_url", "machine", "mode"),
    [
        ("", "", "online"),
        ("", "api.wandb.ai", "online"),
        ("", "wandb.example.org", "offline"),
        ("https://wandb.example.org", "wandb.example.org", "online"),
        ("https://wandb.example.org", "api.wandb.ai", "offline"),
    ],
)
def test_wandb_is_online_with_a_login_for_its_host_in_netrc(
    no_account: Path, monkeypatch: pytest.MonkeyPatch, base_url: str, machine: str, mode: str
) -> None:
    """wandb's own ``login`` writes the entry where the test names no machine."""
    from wandb.sdk.lib import urls, wbauth

    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    wbauth.write_netrc_auth(host=f"https://{machine}" if machine else urls.DEFAULT_BASE_URL, api_key="0" * 40)
    assert (no_account / ".netrc").exists()
    assert wandb_mode() == mode


def test_an_unknown_mode_is_offline_with_a_word(
    no_account: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "garbage")
    assert (wandb_mode(), os.environ["WANDB_MODE"]) == ("offline", "offline")
    assert capsys.readouterr().err.startswith("WANDB_MODE=garbage is none of online,")


@pytest.mark.parametrize("key", ["short", "0" * 40])
def test_a_key_or_a_server_that_does_not_work_does_not_end_a_run(no_account: Path, key: str) -> None:
    """In a process of its own, whose W&B server is a port where nobody listens."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    variables |= {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    script = (
        "import sys; from pathlib import Path; from workbench import tracking; tracking.INIT_TIMEOUT_SECONDS = 3\n"
        "tracker = tracking.Tracker(Path(sys.argv[1])); tracker.log(1, loss=0.5); tracker.close({'loss': 0.5})\n"
    )
    argv = [sys.executable, "-c", script, str(no_account)]
    done = subprocess.run(argv, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("W&B")]
    assert line.startswith("W&B did not start, it runs offline: ")
    assert read_metrics(no_account)[0]["loss"] == 0.5
    assert list((no_account / "wandb").glob("offline-run-*/run-*.wandb"))


def test_wandb_stays_offline_without_a_key_whatever_the_environment_asks(
    no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    (no_account / ".netrc").write_text("default login user password secret\n")
    (no_account / ".netrc").chmod(0o600)
    assert wandb_mode() == "offline"


def test_the_mode_of_the_environment_wins(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "disabled"


def test_without_a_key_nothing_calls_out_and_nothing_asks(no_account: Path) -> None:
    """Every HTTP client of the child process is pointed at a proxy that counts who knocks; stdin is closed."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def count() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(connection)

        threading.Thread(target=count, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            variables |= {name: proxy, name.lower(): proxy}
        script = (
            "import sys; from pathlib import Path; from workbench.tracking import Tracker\n"
            "tracker = Tracker(Path(sys.argv[1])); tracker.log(1, loss=0.5); tracker.close({'loss': 0.5})\n"
        )
        folder = no_account / "run"
        folder.mkdir()
        subprocess.run([sys.executable, "-c", script, str(folder)], env=variables, stdin=subprocess.DEVNULL, check=True)
    assert read_metrics(folder)[0]["loss"] == 0.5
    assert calls == []
