"""The page of a sweep's study: it shows what is there, while it is written, and changes nothing."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from kills import wait_until

from tune.config import SweepConfig
from tune.dashboard import study_page
from tune.points import Proposer, source_of
from tune.study import SweepStudy
from workbench.config import load


@pytest.fixture
def study(tmp_path: Path) -> SweepStudy:
    return SweepStudy(tmp_path, {"validation_loss": "min"}, create=True)


@pytest.fixture
def page(study: SweepStudy, tmp_path: Path) -> Iterator[str]:
    with study_page(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return json.load(answer)


def add_trial(study: SweepStudy, *losses: float) -> int:
    config = load(SweepConfig, None, ["config.base=owner/model", "space.learning_rate.loguniform=[0.001, 0.1]"])
    source = source_of(config)
    assert Proposer(config, source, study).propose()
    trial = study.ask()
    study.begin(trial, source.suggest(trial))
    for step, loss in enumerate(losses, 1):
        study.measured(trial.number, step, loss)
    return trial.number


def test_values_are_seen_while_a_trial_runs(study: SweepStudy, page: str) -> None:
    (known,) = get(f"{page}/api/studies")["study_summaries"]
    add_trial(study, 3.0, 2.5)
    (trial,) = get(f"{page}/api/studies/{known['study_id']}")["trials"]
    assert trial["state"] == "Running"
    assert [value["value"] for value in trial["intermediate_values"]] == [3.0, 2.5]
    study.end(0, "finished", values={"validation_loss": 2.0})
    detail = f"{page}/api/studies/{known['study_id']}"
    wait_until(lambda: get(detail)["trials"][0]["state"] == "Complete", 60, "the page's next look at the study")


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_nothing_can_be_changed(study: SweepStudy, page: str, method: str) -> None:
    (known,) = get(f"{page}/api/studies")["study_summaries"]
    request = urllib.request.Request(f"{page}/api/studies/{known['study_id']}", method=method, data=b"{}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=20)
    assert len(get(f"{page}/api/studies")["study_summaries"]) == 1


def test_another_name_of_the_host_is_refused(page: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{page}/api/studies", Host="rebound.example:8080")


@pytest.mark.skipif(browser.chromium() is None, reason="chromium is not installed")
def test_a_person_reads_the_trials_in_a_browser(study: SweepStudy, page: str) -> None:
    study.end(add_trial(study, 3.0), "finished", values={"validation_loss": 2.4375})
    (known,) = get(f"{page}/api/studies")["study_summaries"]
    with browser.opened(f"{page}/dashboard/studies/{known['study_id']}/trials") as seen:
        for words in ("Complete", "learning_rate", "2.4375"):
            seen.until(f"document.body.innerText.includes('{words}')")
