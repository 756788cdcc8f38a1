"""Mistakes in a sweep: exit code 2, a message that says what to type, and no traceback; before anything starts."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from made_cluster import nodes

from tune.config import SweepConfig
from tune.places import Places
from tune.space import at_point
from tune.study import FILE, SweepStudy
from tune.sweep import deals_other_rows, resume
from tune.tune_cli import _runs, _sweep
from workbench.cli import main
from workbench.config import dump, load
from workbench.errors import UserError
from workbench.runs import finish, open_run, reopen_run

BASE = "config.base=owner/model"
RATE = "space.learning_rate.choice=[0.1, 0.2]"


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of it; the exit code is 2."""
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["space.learning_rat.choice=[0.1]"], "space: no key 'learning_rat'; did you mean 'learning_rate'?"),
        (["space={adapter.rnk: {choice: [4]}}"], "did you mean 'adapter.rank'?"),
        ([RATE, "config.batchsize=4"], "did you mean 'config.batch_size'"),
        ([], "the space is empty: give space"),
        ([RATE, "constraints=['learning_rate > 1']"], "the space is empty: of 64 points drawn none is allowed"),
        ([RATE, "constraints=['learning_rat > 1']"], "no key 'learning_rat'; did you mean 'learning_rate'?"),
        (["space.learning_rate.choice=[-1]"], "space.learning_rate: -1 is refused"),
        (["space={adapter.rank: {choice: [4, many]}}"], "'many' is refused"),
        (["space.workers.choice=[1, 2]"], "'workers' says where a trial runs"),
        ([RATE, "searcher=grid", "space.weight_decay.uniform=[0, 1]"], "a grid needs values that can be counted"),
        ([RATE, "config.workers=3", "config.strategy=fsdp2"], "batch_size 16 does not divide over 3 workers"),
        ([RATE, "function=points:make"], "space and function exclude each other"),
        (["function=nowhere:make", "searcher=random"], "give module:name"),
        ([RATE, "metrics={seconds: min}"], "give seconds after another"),
        (["space.learning_rate.uniform=[0.1, 1]", "repeat.top=1", "budget={hours: 1}"], "give budget.trials"),
        ([RATE, "budget={gpu_hours: 1}"], "spend no GPU-hours: give budget.trials, budget.hours or budget.target"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_it_starts(
    runs_root: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    assert words in mistake(capsys, "run", BASE, *overrides)
    assert not (runs_root / "tune-run").exists()


@pytest.fixture
def paused(runs_root: Path) -> Path:
    """A sweep with one trial that has finished and one that is to come."""
    config = load(SweepConfig, None, [BASE, RATE, "budget.trials=2"])
    with open_run("tune", "run", config, name="paused") as run:
        study = SweepStudy(run.folder, config.metrics, create=True)
        study.write_note("config", config.model_dump(mode="json"))
        study.enqueue({"learning_rate": 0.1})
        study.begin(study.ask(), {"learning_rate": 0.1})
        study.end(0, "finished", values={"validation_loss": 1.0})
        finish(run, {})
    return run.folder


def test_orders_that_a_sweep_cannot_follow(paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" in mistake(capsys, "resume", f"{paused.name}x")
    assert "has no trial 7; it has 0" in mistake(capsys, "stop", str(paused), "7")
    assert "trial 0 has ended: finished" in mistake(capsys, "stop", str(paused), "0")
    assert "is finished, not running" in mistake(capsys, "pause", str(paused))
    assert "say what it gets" in mistake(capsys, "extend", str(paused))
    assert "is no point" in mistake(capsys, "extend", str(paused), "--add", "0.1")
    assert "--trials 1: it has 2 already" in mistake(capsys, "extend", str(paused), "--trials", "1")
    assert "--target inf: give a number" in mistake(capsys, "extend", str(paused), "--target", "inf")
    said = mistake(capsys, "extend", str(paused), "--add", "{learning_rate: 0.9}")
    assert "learning_rate=0.9 is not among the values of the space" in said


def test_a_sweep_that_ended_before_its_first_trial_is_begun_anew(
    runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(SweepConfig, None, [BASE, RATE])
    with open_run("tune", "run", config, name="early") as run:
        finish(run, {})
    said = mistake(capsys, "resume", str(run.folder))
    assert f"ended before its first trial; to begin anew: workbench tune run {run.folder / 'config.yaml'}" in said


def test_a_report_names_no_file_that_is_not_there_yet(paused: Path) -> None:
    for kept in (False, True):
        if kept:
            best = paused / "artifacts" / "best" / "config.yaml"
            best.parent.mkdir(parents=True)
            config = load(SweepConfig, None, [BASE, RATE])
            best.write_text("# workbench train sft\n" + dump(at_point(config.config, {"learning_rate": 0.1})))
        with pytest.raises(SystemExit) as ended:
            main(["tune", "report", str(paused)])
        assert ended.value.code == 0
        page = (paused / "report.html").read_text()
        assert ("best/config.yaml" in page, "trial 0, so far: it is kept" in page) == (kept, not kept)


def test_a_report_needs_no_rows(tmp_path: Path, runs_root: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    config = load(SweepConfig, None, [BASE, RATE, f"config.data=[{rows}]"])
    with open_run("tune", "run", config) as run:
        study = SweepStudy(run.folder, config.metrics, create=True)
        study.enqueue({"learning_rate": 0.1})
        study.begin(study.ask(), {"learning_rate": 0.1})
        study.end(0, "finished", values={"validation_loss": 1.0})
        finish(run, {})
    rows.rename(tmp_path / "moved.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["tune", "report", str(run.folder)])
    assert ended.value.code == 0


def test_a_study_that_ends_amid_a_line_takes_no_order_until_its_driver_has_mended_it(
    paused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (paused / FILE).open("a") as journal:
        journal.write('{"op_code": 4, "worker')
    for order in (["pause"], ["stop", "0"], ["extend", "--trials", "4"]):
        said = mistake(capsys, order[0], str(paused), *order[1:])
        assert f"ends amid a line, which its driver drops: workbench tune resume tune-run/{paused.name}" in said
    _, config, study = _sweep(str(paused))  # as resume does
    assert not _runs(paused, study)
    SweepStudy(paused, config.metrics, repair=True).write_note("pause", None)
    assert [trial.state for trial in SweepStudy(paused, config.metrics).trials()] == ["finished"]


@pytest.mark.parametrize(
    ("point", "others"), [({"learning_rate": 0.2}, False), ({"steps": 20}, True), ({"seed": 1}, True)]
)
def test_a_rerun_that_deals_other_rows_is_told_from_one_that_does_not(point: dict[str, Any], others: bool) -> None:
    config = load(SweepConfig, None, [BASE, RATE, "config.steps=40"])
    assert deals_other_rows(config, at_point(config.config, point)) is others


def test_a_target_alone_is_a_budget() -> None:
    assert load(SweepConfig, None, [BASE, RATE, "budget={target: 0.5}"]).budget.trials is None


def test_a_trial_that_is_to_come_is_stopped_while_the_sweep_does_not_run(paused: Path) -> None:
    study = SweepStudy(paused, {"validation_loss": "min"})
    study.enqueue({"learning_rate": 0.2})
    with pytest.raises(SystemExit) as ended:
        main(["tune", "stop", str(paused), "1"])
    assert ended.value.code == 0
    trial = SweepStudy(paused, {"validation_loss": "min"}).trial(1)
    assert (trial.state, trial.point) == ("stopped", {"learning_rate": 0.2})


def test_an_added_point_is_read_as_a_config_is(runs_root: Path) -> None:
    config = load(SweepConfig, None, [BASE, "space.learning_rate.loguniform=[1e-5, 1e-3]"])
    with open_run("tune", "run", config) as run:
        study = SweepStudy(run.folder, config.metrics, create=True)
        finish(run, {})
    with pytest.raises(SystemExit) as ended:
        main(["tune", "extend", str(run.folder), "--add", "{learning_rate: 1e-4}"])
    assert ended.value.code == 0
    assert study.waiting() == 1


def test_a_port_that_no_host_has(paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "65535" in mistake(capsys, "dashboard", str(paused), "--port", "65536")


def test_a_function_in_a_module_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_written.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, "run", BASE, "function=half_written:make", "searcher=random", "--dry-run")
    assert "function=half_written:make: SyntaxError" in said


@pytest.mark.parametrize(
    ("returned", "more", "words"),
    [
        ("{'workers': 2}", [], "it sets 'workers', which is the same for all trials: set config.workers"),
        ("{'data': 'other.jsonl'}", [], "it sets 'data', which is the same for all trials: set config.data"),
        ("{'learning_rate': 0.1}", ["constraints=['learning_rate > 1']"], "breaks the constraint 'learning_rate > 1'"),
        ("{'learning_rate': 0.1}", ["constraints=['learning_rat > 1']"], "did you mean 'learning_rate'?"),
    ],
)
def test_a_function_is_checked_as_a_space_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    returned: str, more: list[str], words: str,
) -> None:  # fmt: skip
    (tmp_path / "made_points.py").write_text(f"def make(trial):\n    return {returned}\n")
    monkeypatch.delitem(sys.modules, "made_points", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert words in mistake(capsys, "run", BASE, "function=made_points:make", "searcher=random", "--dry-run", *more)


def test_a_port_that_is_taken(paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "give another with --port" in mistake(capsys, "dashboard", str(paused), "--port", port)


def test_a_changed_config_is_no_sweep_that_can_go_on(paused: Path) -> None:
    file = paused / "config.yaml"
    file.write_text(file.read_text().replace("batch_size: 16", "batch_size: 8"))
    config = load(SweepConfig, file, visit_paths=False)
    words = r"began with config.batch_size=16, and its config.yaml now has 8: .* put it back, or start a new sweep"
    with reopen_run(paused, config) as run, pytest.raises(UserError, match=words):
        resume(config, run)


def test_a_space_in_which_nothing_fits_any_card_names_what_is_missing(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 16, "num_attention_heads": 64}
    LlamaConfig(vocab_size=512, **sizes).save_pretrained(tmp_path)
    keys = [f"config.base={tmp_path}", "config.method=full", "config.quantization=none", "config.max_length=64"]
    resources = "resources={gpu: {memory: '>=12GB'}}"
    config = load(SweepConfig, None, [*keys, RATE, resources])
    trials = [at_point(config.config, {"learning_rate": rate}) for rate in (0.1, 0.2)]
    words = r"of the first 2 trials none fits: it needs .* the largest card that it may get has 96 GB; look with"
    with pytest.raises(UserError, match=words):
        Places(config.config, nodes()).check(trials, nodes(), pytest.fail)
