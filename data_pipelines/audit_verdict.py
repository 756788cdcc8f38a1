"""What an audit comes to: each finding that asks for a decision, how much it is, and the rule that would act on it."""

from typing import Any

from data_pipelines.corpus import Corpus
from data_pipelines.statistics import Statistics

FEW_LANGUAGE = 0.05
"""A language with less than this share of the documents is told with all others of its kind."""


def findings(corpus: Corpus, trained: list[str]) -> list[dict[str, Any]]:
    """A row a finding, those of the most documents first: how many, their share, and what removes them in a filter."""
    statistics = corpus.statistics
    copies = statistics.documents - statistics.kept
    leaking = sum(statistics.splits[split]["leaks"] for split in trained)
    keep = ", ".join(trained)
    rows: list[tuple[str, int, str, str]] = [
        ("copies of another document", copies, "copy: not keep", "embed and train pretrain leave them out anyway"),
        ("evaluation texts in training texts", leaking if corpus.leaks else 0,
         f'leaked: leak != "" and split in [{keep}]', "until they are gone no score on them counts"),
        ("secrets (keys, tokens)", statistics.with_secrets, "secret: secrets > 0", "change every one that is real"),
        ("personal data", statistics.with_personal, "", "redact: [email, phone, iban, card, national_id]"),
        ("encoding damage", statistics.mojibake, "damage: mojibake > 2", ""),
        ("repeats itself (Gopher)", statistics.broken["gopher_repetition"]["any"],
         'repeats itself: gopher_repetition != ""', "look first: the rules are made for web pages"),
        ("boilerplate phrases", statistics.boilerplate, "boilerplate: boilerplate > 2", ""),
        ("other languages", *_other_languages(statistics), "short texts are often taken for a wrong one"),
        ("conflicting answers to one question", statistics.conflicts, "conflict: conflicts > 0", "read some first"),
        *((f"answers flagged {name}", number, f"{name}: '\"{name}\" in flags'", "read some first")
          for name, number in statistics.flags.items()),
    ]  # fmt: skip
    shown = [
        _row(name, number, round(100 * number / statistics.documents, 2), rule, note)
        for name, number, rule, note in sorted(rows, key=lambda row: -row[1])
        if number
    ]
    if corpus.quarantined:
        told = "artifacts/quarantine.parquet has each with source and reason"
        shown.append(_row("rows and files that cannot be read", len(corpus.quarantined), "", "", told))
    return shown


def _row(finding: str, documents: int, share: float | str, rule: str, note: str) -> dict[str, Any]:
    return {"finding": finding, "documents": documents, "share, %": share, "rule for data filter": rule, "note": note}


def _other_languages(statistics: Statistics) -> tuple[int, str]:
    """Documents in languages that are few here, and the rule that keeps the others."""
    known = {name: number for name, number in statistics.languages.items() if name != "und"}
    main = [name for name, number in known.items() if number >= FEW_LANGUAGE * statistics.documents]
    few = sum(number for name, number in known.items() if name not in main)
    kept = ", ".join([*sorted(main), "und"])
    return few, f"language: language not in [{kept}] and characters > 200"
