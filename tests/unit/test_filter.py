"""The clean set and the comparison, by the commands, on an audit that is made here without Ray."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_corpus import audited

from data_pipelines.measure import Measures
from data_pipelines.sources import Row
from workbench.cli import main


def ran(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    return int(stop.value.code or 0)


def newest(runs_root: Path, kind: str) -> Path:
    return max((runs_root / kind).iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_reasons_redaction_and_what_changed(tmp_path: Path, runs_root: Path) -> None:
    exchange = json.dumps([["user", "Whom do I ask?"], ["assistant", "Ask bob@example.org for it, please."]])
    rows = [
        Row("", f"Text {i} says what the {i}th of them has to say, and no more.", "s", "", f"k{i}") for i in range(4)
    ]
    asked = "Whom do I ask?\n\nAsk bob@example.org for it, please."
    rows.append(Row("Of bob@example.org", asked, "s", "", "mail", exchange))
    rows.append(Row("", "Too short.", "s", "", "short"))
    rows.append(Row("", rows[0].text.upper(), "s", "", "again"))
    audit = tmp_path / "audit" / "artifacts"
    corpus = audited(audit, {"": rows}, measures=Measures(repetition=False, exchanges=True))
    rules = "remove={too short: words < 3, duplicate: not keep}"
    assert ran("data", "filter", f"audit={audit.parent}", rules, "redact=[email]") == 0
    clean = newest(runs_root, "data-filter")
    removed = {row["id"]: row for row in pq.read_table(clean / "artifacts/removed.parquet").to_pylist()}
    assert {name: row["reason"] for name, row in removed.items()} == {"short": "too short", "k0": "duplicate"}
    assert removed["short"]["seen"] == "words=2"
    kept = {row["id"]: row for row in pq.read_table(clean / "artifacts/documents").to_pylist()}
    assert sorted(kept) == ["again", "k1", "k2", "k3", "mail"]
    assert kept["mail"]["text"] == "Whom do I ask?\n\nAsk [email] for it, please."
    assert json.loads(kept["mail"]["conversation"])[1] == ["assistant", "Ask [email] for it, please."]
    assert "bob@" not in str(kept["mail"])
    assert (kept["mail"]["emails"], kept["mail"]["characters"]) == (0, len(kept["mail"]["text"]))
    assert ran("data", "compare", f"before={audit.parent}", f"after={clean}") == 0
    summary = json.loads((newest(runs_root, "data-compare") / "summary.json").read_text())
    assert (summary["added"], summary["removed"], summary["changed"], summary["unchanged"]) == (0, 2, 1, 4)
    assert summary["before"] == corpus.fingerprint
    assert summary["after"] == json.loads((clean / "summary.json").read_text())["fingerprint"]
    inputs = json.loads((clean / "inputs.json").read_text())
    assert inputs["audit"]["version"] == corpus.fingerprint


def test_redaction_finds_what_the_audit_found(tmp_path: Path, runs_root: Path) -> None:
    """In the turns too, where the word that says what a number is stands in the turn before."""
    said = {"pesel": ["What is your PESEL?", "44051401359"], "phone": ["Whom?", "Call 415-555-2671 today please"]}
    rows = [
        Row("", "\n\n".join(turns), "s", "", name, json.dumps([["user", turns[0]], ["assistant", turns[1]]]))
        for name, turns in said.items()
    ]
    audited(tmp_path / "artifacts", {"": rows}, measures=Measures(exchanges=True, phone_region="US"))
    assert ran("data", "filter", f"audit={tmp_path}", "redact=[phone,national_id,card]", "remove={}") == 0
    clean = newest(runs_root, "data-filter")
    summary = json.loads((clean / "summary.json").read_text())
    assert [summary[f"redacted: {kind}"] for kind in ("phone", "national_id", "card")] == [1, 1, 0]
    kept = {row["id"]: row for row in pq.read_table(clean / "artifacts/documents").to_pylist()}
    assert kept["pesel"]["text"] == "What is your PESEL?\n\n[national_id]"
    assert kept["pesel"]["label"] == "[national_id]"
    assert kept["phone"]["text"] == "Whom?\n\nCall [phone] today please"
    assert "44051401359" not in str(kept) and "415-555-2671" not in str(kept)
    assert (kept["pesel"]["national_ids"], kept["phone"]["phones"]) == (0, 0)
    assert ran("data", "compare", f"before={clean}", f"after={tmp_path}") == 0
    changes = pq.read_table(newest(runs_root, "data-compare") / "artifacts/changes.parquet").to_pylist()
    assert {row["text"] for row in changes} == {"What is your PESEL? [national_id]", "Whom? Call [phone] today please"}


def test_nothing_left_is_a_failure(tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(tmp_path / "artifacts", {"": [Row("", "A text.", "s")]}, measures=Measures(repetition=False))
    assert ran("data", "filter", f"audit={tmp_path}", "remove={all: words > 0}") == 1
    assert "nothing is left: 1 documents were removed" in capsys.readouterr().err


def test_a_column_that_the_audit_lacks_is_a_mistake(
    tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audited(tmp_path / "artifacts", {"": [Row("", "A text.", "s")]}, measures=Measures(repetition=False))
    assert ran("data", "filter", f"audit={tmp_path}", "remove={all: wrods > 0}") == 2
    assert "did you mean words?" in capsys.readouterr().err
    assert not list(runs_root.glob("data-filter/*"))


def test_a_split_that_is_not_there_is_a_mistake(
    tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {name: [Row("", f"A text of {name}.", "s")] for name in ("train", "test")}
    audited(tmp_path / "artifacts", splits, evaluation=("test",), measures=Measures(repetition=False))
    assert ran("data", "filter", f"audit={tmp_path}", "splits=[tset]") == 2
    assert "there is no split 'tset'" in (said := capsys.readouterr().err) and "there are: test, train" in said
