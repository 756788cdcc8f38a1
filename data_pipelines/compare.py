"""``workbench data compare before=runs/data-audit/OLD after=runs/data-audit/latest``: what changed between two data
versions, document by document and finding by finding."""

from collections import Counter
from typing import Any

import numpy as np
from pydantic import Field

from data_pipelines.audited import open_audit, phone_region_of
from data_pipelines.measure import content_key
from data_pipelines.statistics import snippet
from workbench.config import Config, InputPath
from workbench.data_version import version_of
from workbench.runs import Run, Summary

SHOWN = 20
NAMES = ("language", "script", "split", "duplicate_kind", "leak", "gopher_quality", "gopher_repetition", "c4", "flags")
"""Columns of words, of which the most changed values are shown."""


class CompareConfig(Config):
    """Two audits, or two clean sets."""

    before: InputPath = Field(description="a run of 'data audit' or 'data filter', or its artifacts/documents")
    after: InputPath = Field(description="the other")


def check(config: CompareConfig) -> None:
    """Raise UserError for what is no audit."""
    open_audit(config.before)
    open_audit(config.after)


def run(config: CompareConfig, run: Run) -> Summary:
    """Write ``artifacts/changes.parquet`` (id, change, and the title, source and split) and the report.

    A document is changed where the id stays and the text does not, which only given ids allow: a changed text that is
    named by its content is one removed and one added.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sides = {"before": open_audit(config.before), "after": open_audit(config.after)}
    versions = {side: version_of(documents) for side, documents in sides.items()}
    for side, path in (("before", config.before), ("after", config.after)):
        run.input(side, version=versions[side], documents=str(path))
    texts = {side: _contents(documents) for side, documents in sides.items()}
    old, new = texts["before"], texts["after"]
    changes = dict.fromkeys(new.keys() - old.keys(), "added")
    changes |= dict.fromkeys(old.keys() - new.keys(), "removed")
    changes |= {name: "changed" for name in old.keys() & new.keys() if old[name] != new[name]}
    rows = _rows(sides, changes)
    schema = pa.schema([(name, pa.string()) for name in ("id", "change", "title", "source", "split", "text")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), run.artifact("changes.parquet"))
    counts = Counter(changes.values())
    summary = {
        "before": versions["before"],
        "after": versions["after"],
        "documents_before": len(old),
        "documents_after": len(new),
        **{kind: counts[kind] for kind in ("added", "removed", "changed")},
        "unchanged": len(new) - counts["added"] - counts["changed"],
    }
    findings = {side: _findings(documents) for side, documents in sides.items()}
    report = run.report
    report.table("Findings", _numbers(findings), note="a mean over the documents; the total is of counts")
    for name in NAMES:
        shown = _words(findings, name)
        if shown:
            report.table(f"By {name}", shown)
    for kind in ("added", "removed", "changed"):
        some = [{k: v for k, v in row.items() if k != "change"} for row in rows if row["change"] == kind][:SHOWN]
        if some:
            report.table(f"First {kind}", some, note="all are in artifacts/changes.parquet")
    return summary


def _contents(documents: Any) -> dict[str, int]:
    return {
        name: content_key(text)
        for batch in documents.to_batches(columns=["id", "text"])
        for name, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
    }


def _rows(sides: dict[str, Any], changes: dict[str, str]) -> list[dict[str, str]]:
    import pyarrow as pa

    rows = []
    for side, kinds in (("before", ("removed",)), ("after", ("added", "changed"))):
        region = phone_region_of(sides[side].schema)
        for batch in sides[side].to_batches(columns=["id", "title", "source", "split", "text"]):
            names = batch["id"].to_pylist()
            places = [place for place, name in enumerate(names) if changes.get(name) in kinds]
            for row in batch.take(pa.array(places, pa.int64())).to_pylist():
                rows.append({**row, "change": changes[row["id"]], "text": snippet(row["text"], region)})
    return sorted(rows, key=lambda row: (row["change"], row["id"]))


def _findings(documents: Any) -> dict[str, Any]:
    """The sum of every numeric column, the counts of every column of words, and how many documents there are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    fields = [f for f in documents.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    words = [name for name in NAMES if name in documents.schema.names]
    result: dict[str, Any] = {"documents": 0, "sums": Counter(), "words": {name: Counter() for name in words}}
    result["whole"] = {f.name for f in fields if pa.types.is_integer(f.type)}
    for batch in documents.to_batches(columns=[*(f.name for f in fields), *words, "keep"]):
        result["documents"] += batch.num_rows
        for field in fields:
            result["sums"][field.name] += pc.sum(batch[field.name]).as_py() or 0
        result["sums"]["keep"] += pc.sum(pc.cast(batch["keep"], pa.int64())).as_py() or 0
        for name in words:
            result["words"][name].update(batch[name].to_pylist())
    return result


def _numbers(findings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    old, new = findings["before"], findings["after"]
    rows = []
    for name in dict.fromkeys([*old["sums"], *new["sums"]]):
        means = [float(side["sums"][name]) / max(1, side["documents"]) for side in (old, new)]
        row: dict[str, Any] = {"finding": name, "mean before": means[0], "mean after": means[1]}
        row["change, %"] = round(100 * (means[1] / means[0] - 1), 1) if means[0] else None
        whole = name in old["whole"] | new["whole"] or name == "keep"
        row |= {f"total {k}": int(s["sums"][name]) if whole else None for k, s in findings.items()}
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(np.log1p(row["mean after"]) - np.log1p(row["mean before"])))


def _words(findings: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    old, new = (findings[side]["words"].get(name, Counter()) for side in ("before", "after"))
    values = sorted(set(old) | set(new), key=lambda value: (-abs(new[value] - old[value]), str(value)))
    return [{name: value or "(none)", "before": old[value], "after": new[value]} for value in values[:10] if old != new]
