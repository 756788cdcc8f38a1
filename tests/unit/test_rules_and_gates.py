"""The conditions of a filter and the gates of an audit: what they mean, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pytest
from made_corpus import audited

from data_pipelines.audit import AuditConfig, shares, summarise, without_documents
from data_pipelines.gates import check_gates, crossed
from data_pipelines.reading import Reading
from data_pipelines.rules import Rule
from data_pipelines.sources import Row

TABLE = pa.table(
    {
        "words": [3, 20, None],
        "language": ["en", "de", "und"],
        "keep": [True, False, True],
        "c4": ["few-sentences", "", "javascript few-sentences"],
        "score": [0.5, 0.25, 0.75],
    }
)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("words < 12", [True, False, False]),
        ("not words < 12", [False, True, False]),
        ("not keep", [False, True, False]),
        ("language not in [en, und]", [False, True, False]),
        ("language == de or score >= 0.75", [False, True, True]),
        ("(language == de or score >= 0.75) and keep", [False, False, True]),
        ("'javascript' in c4", [False, False, True]),
        ("c4 != ''", [True, False, True]),
        ("score > -1", [True, True, True]),
        ("words in [3.5]", [False, False, False]),
        ("words in [3.0, 4]", [True, False, False]),
        ("language in []", [False, False, False]),
    ],
)
def test_conditions(condition: str, expected: list[bool]) -> None:
    assert Rule.parse("r", condition).holds(TABLE).to_pylist() == expected


@pytest.mark.parametrize(
    "condition",
    ["words <", "12 > words", "words", "1 < words < 3", "language in en", "words < [1]", "f(words)", "words + 1 < 2",
     "words < other()", "__import__('os')", "language is en",
     "words < 99999999999999999999", "words in [99999999999999999999]", "words < {[]: 1}", "words < None",
     "words in [[1]]", "words < b'x'", "[a] in language", "5 in language"],
)  # fmt: skip
def test_what_is_no_condition(condition: str) -> None:
    if condition == "words":
        assert Rule.parse("r", condition).findings == ["words"]
        return
    with pytest.raises(ValueError):
        Rule.parse("r", condition)


def test_a_finding_that_is_not_there_names_its_neighbour() -> None:
    with pytest.raises(ValueError, match="no finding 'word'; did you mean words"):
        Rule.parse("r", "word < 3").check(TABLE.column_names)
    with pytest.raises(ValueError, match="words is int64"):
        Rule.parse("r", "words < many").holds(TABLE)


def test_what_a_rule_saw() -> None:
    rule = Rule.parse("r", "score > 0.3 and (words < 12 or score > 9)")
    assert rule.seen({"words": 3, "score": 1 / 3}) == "score=0.3333, words=3"


def test_gates() -> None:
    figures = {"leakage": 0.25, "secrets": 0.0}
    assert crossed(["leakage>0", "secrets > 0"], figures) == ["leakage is 0.25 (leakage>0)"]
    assert crossed(["leakage>=0.25", "leakage<0.25"], figures) == ["leakage is 0.25 (leakage>=0.25)"]
    check_gates(["leakage>0"], list(figures))
    with pytest.raises(ValueError, match="did you mean leakage"):
        check_gates(["leakages>0"], list(figures))
    for wrong in ("leakage", "leakage>", "leakage>a", ">1"):
        with pytest.raises(ValueError, match="in quotes"):
            check_gates([wrong], list(figures))


@pytest.mark.parametrize("rows", [[], [Row("", "", "test 1"), Row("", "", "test 2", "undecodable line")]])
def test_a_split_without_documents_is_no_split_without_leaks(tmp_path: Path, rows: list[Row]) -> None:
    config = AuditConfig(splits={name: Reading(source=f"{name}.jsonl") for name in ("train", "test")})
    corpus = audited(tmp_path, {"train": [Row("", "some words", "train 1")], "test": rows}, evaluation=("test",))
    said = "2 rows were read and all were quarantined, the first as 'empty'" if rows else "0 rows were read"
    assert without_documents(config, corpus) == [f"splits.test: no documents in test.jsonl: {said}"]


def test_gates_see_an_audit_that_quarantined_everything(tmp_path: Path) -> None:
    corpus = audited(tmp_path, {"": [Row("", "", "a")]})
    config = AuditConfig(source="a.jsonl")
    assert crossed(["quarantine>0.5", "documents<1"], shares(corpus) | summarise(config, corpus)) == [
        "quarantine is 1 (quarantine>0.5)",
        "documents is 0 (documents<1)",
    ]
    assert len(without_documents(config, corpus)) == 1
