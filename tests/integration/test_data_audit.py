"""Sources, splits, gates, the clean set and the comparison, by the commands as a person types them."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from workbench.cli import main

QUESTION = "Which of the two rivers that meet below the old town carries more water in the month of May"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def command(runs_root: Path, *arguments: str) -> tuple[int, Path]:
    """(exit code, the run folder that it made)."""
    code = 0
    try:
        main([*arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    kind = "-".join(arguments[:2])
    folders = sorted((runs_root / kind).glob("*"), key=lambda path: path.stat().st_mtime)
    return code, folders[-1] if folders else runs_root


def splits(folder: Path) -> list[str]:
    train = [{"text": f"{QUESTION}? The left one, by far."}, {"text": "Something else altogether, short and plain."}]
    test = [{"text": f"Say: {QUESTION}? Nobody knows."}, {"text": "A text that is in no other place of the two sets."}]
    paths = {name: write_lines(folder / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))}
    return [f"splits.{name}.source={path}" for name, path in paths.items()]


def test_a_gate_that_is_not_passed_ends_with_one_and_leaves_the_report(
    tmp_path: Path, runs_root: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*splits(tmp_path), "cpus_per_task=0.5", "blocks=2"]
    code, folder = command(runs_root, "data", "audit", *given, "--fail-on", "leakage>0")
    assert code == 1
    assert "leakage is 0.5 (leakage>0)" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["leaks"] == 1
    assert "Nobody knows" in (folder / "report.html").read_text()
    [leak] = pq.read_table(folder / "artifacts" / "leaks.parquet").to_pylist()
    assert (leak["kind"], leak["evaluation_span"], leak["training_span"]) == ("ngram", QUESTION, QUESTION)
    code, folder = command(runs_root, "data", "audit", *given, "--fail-on", "leakage>0.5")
    assert code == 0
    write_lines(tmp_path / "test.jsonl", [{"text": ""}])
    for gate, expected in (("leakage>0", 2), ("quarantine>0.1", 1)):
        code, folder = command(runs_root, "data", "audit", *given, "--fail-on", gate)
        assert code == expected
        assert "splits.test: no documents" in capsys.readouterr().err


def test_the_clean_set_and_what_it_changed(tmp_path: Path, runs_root: Path, ray_session: None) -> None:
    rows = [
        {"key": f"k{i}", "text": f"Text {i} says what the {i}th of them has to say, and no more."} for i in range(6)
    ]
    rows += [{"key": "mail", "text": "Write to ann.smith@example.org if you want to know more of it."}]
    rows += [{"key": "short", "text": "Too short."}, {"key": "again", "text": rows[0]["text"].upper()}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    code, audit = command(runs_root, "data", "audit", f"source={file}", "id_column=key", "cpus_per_task=0.5")
    assert code == 0
    rules = "remove={duplicate: not keep, too short: words < 3}"
    code, clean = command(runs_root, "data", "filter", f"audit={audit}", rules, "redact=[email]")
    assert code == 0
    kept = {row["id"]: row for row in pq.read_table(clean / "artifacts" / "documents").to_pylist()}
    removed = {row["id"]: row for row in pq.read_table(clean / "artifacts" / "removed.parquet").to_pylist()}
    assert {name: row["reason"] for name, row in removed.items()} == {"short": "too short", "again": "duplicate"} or (
        {name: row["reason"] for name, row in removed.items()} == {"short": "too short", "k0": "duplicate"}
    )
    assert removed["short"]["seen"] == "words=2"
    assert len(kept) == 7
    assert kept["mail"]["text"] == "Write to [email] if you want to know more of it."
    assert all(row["keep"] for row in kept.values())
    code, compared = command(runs_root, "data", "compare", f"before={audit}", f"after={clean}")
    assert code == 0
    summary = json.loads((compared / "summary.json").read_text())
    assert (summary["added"], summary["removed"], summary["changed"], summary["unchanged"]) == (0, 2, 1, 6)
    assert summary["before"] == json.loads((audit / "summary.json").read_text())["fingerprint"]
    assert summary["after"] == json.loads((clean / "summary.json").read_text())["fingerprint"]


def test_an_instruction_set_from_a_database(tmp_path: Path, runs_root: Path, ray_session: None) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "set.db")) as database:
        database.execute("CREATE TABLE pairs (question TEXT, answer TEXT)")
        pairs = [("Is it far?", "yes"), ("Is it far?", "no"), ("Is it near?", "yes"), ("Is it here?", None)]
        database.executemany("INSERT INTO pairs VALUES (?, ?)", pairs)
        database.commit()
    columns = ["instruction_column=question", "output_column=answer", "form=alpaca"]
    source = [f"source=sqlite:///{tmp_path / 'set.db'}", "query=pairs", *columns]
    code, folder = command(runs_root, "data", "audit", *source, "cpus_per_task=0.5")
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["documents"], summary["conflicts"], summary["quarantined"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "audit", "--fail-on", "leaks"], "in quotes (the shell takes > for itself)"),
        (["data", "audit", "fail_on=[duplicate>0]"], "did you mean duplicates?"),
        (["data", "audit", "evaluation=[test]"], "give splits"),
        (["data", "audit", "splits={a: {}, b: {}}"], "evaluation: [b]"),
        (["data", "audit", "splits={train: {}}", "source=x"], "write it below each split"),
        (["data", "filter", "audit={here}"], "was not written by 'data audit'"),
        (["data", "filter", "audit={here}", "remove={short: words < }"], "write for example words < 12"),
        (["data", "filter", "audit={here}", "redact=[name]"], "no kind 'name'"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    here = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["1"], "body": ["x"]}), here)
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("{here}", str(here)) for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
