"""What an audit comes to: every finding is told with its share, and the rule beside it is one that filter takes."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data_pipelines.audit_verdict import findings
from data_pipelines.rules import Rule
from data_pipelines.statistics import Statistics


@pytest.fixture
def corpus() -> Any:
    statistics = Statistics(documents=200, kept=180, with_secrets=3, with_personal=12, mojibake=2, boilerplate=4)
    statistics.conflicts = 5
    statistics.flags.update({"refusal": 7})
    statistics.broken["gopher_repetition"]["any"] = 9
    statistics.languages.update({"en": 150, "de": 40, "fr": 6, "und": 4})
    statistics.splits["train"] = Counter(leaks=8)
    statistics.splits["test"] = Counter(leaks=6)
    return SimpleNamespace(statistics=statistics, leaks=[{}] * 6, quarantined=[{}] * 2)


def test_findings_are_told_by_size_with_their_share(corpus: Any) -> None:
    rows = findings(corpus, ["train"])
    assert [row["documents"] for row in rows] == [20, 12, 9, 8, 7, 6, 5, 4, 3, 2, 2]
    assert rows[0] == {**rows[0], "finding": "copies of another document", "share, %": 10.0}
    assert "language not in [de, en, und]" in " ".join(row["rule for data filter"] for row in rows)


def test_every_rule_is_one_that_filter_takes(corpus: Any) -> None:
    rules = [rule for row in findings(corpus, ["train"]) if (rule := row["rule for data filter"])]
    assert len(rules) == 9
    for text in rules:
        [(reason, condition)] = yaml.safe_load(text).items()
        Rule.parse(reason, condition)


def test_a_clean_set_has_no_findings() -> None:
    clean: Any = SimpleNamespace(statistics=Statistics(documents=3, kept=3), leaks=[], quarantined=[])
    assert findings(clean, []) == []
