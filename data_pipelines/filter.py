"""``workbench data filter configs/data/filter.yaml``: make the clean set of an audit, with a reason for each removal.

It reads what an audit wrote and measures nothing anew: changing a rule costs seconds. What is left has the columns of
the audit, so that everything that reads an audit's documents reads these.
"""

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from data_pipelines.audited import open_audit, phone_region_of
from data_pipelines.exchanges import keys_of
from data_pipelines.pii import BETWEEN_PARTS, KINDS, redact, redact_parts
from data_pipelines.rules import Rule
from workbench.config import Config, InputPath
from workbench.data_version import version_of
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 8192
EXAMPLES = 3


class FilterConfig(Config):
    """Which documents go, why, and what is blotted out in the others."""

    audit: InputPath = Field(description="a run of 'data audit', or its artifacts/documents")
    remove: dict[str, str] = Field(
        default={"duplicate": "not keep"},
        description="a condition for each reason, such as {too short: words < 12}; the first that holds is the reason",
    )
    splits: list[str] = Field(default=[], description="only these splits; empty: all")
    redact: list[str] = Field(default=[], description=f"blot these out of the texts: {', '.join(KINDS)}")

    @field_validator("remove")
    @classmethod
    def _parsed(cls, remove: dict[str, str]) -> dict[str, str]:
        for reason, condition in remove.items():
            try:
                Rule.parse(reason, condition)
            except ValueError as error:
                raise ValueError(f"{reason}: {error}") from None
        return remove

    @field_validator("redact")
    @classmethod
    def _known_kinds(cls, kinds: list[str]) -> list[str]:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"no kind '{unknown[0]}'; there are {', '.join(KINDS)}")
        return kinds

    @property
    def rules(self) -> list[Rule]:
        """The rules in their order."""
        return [Rule.parse(reason, condition) for reason, condition in self.remove.items()]


def check(config: FilterConfig) -> None:
    """Raise UserError for what is no audit, and for rules on findings that it does not have."""
    import pyarrow.compute as pc

    documents = open_audit(config.audit)
    if config.splits:
        present = set(pc.unique(documents.to_table(columns=["split"])["split"]).to_pylist())
        if unknown := sorted(set(config.splits) - present):
            known = ", ".join(sorted(present - {""})) or "none"
            raise UserError(f"splits: there is no split '{unknown[0]}' in {config.audit}; there are: {known}")
    empty = documents.schema.empty_table()
    try:
        for rule in config.rules:
            rule.check(documents.schema.names)
            rule.holds(empty)
    except ValueError as error:
        raise UserError(f"remove: {error}") from None


def run(config: FilterConfig, run: Run) -> Summary:
    """Write ``artifacts/documents/`` (what is left, ``keep`` true for all), and ``artifacts/removed.parquet`` (id,
    title, source, split, reason, and the findings that gave it).

    Raises UserError for what is no audit, Failure where nothing is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = open_audit(config.audit)
    run.input("audit", version=version_of(documents), documents=str(config.audit))
    folder = run.artifact("documents")
    partial = folder.with_name(".documents.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    reasons: Counter[tuple[str, str]] = Counter()
    redacted: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    kept = 0
    fields = [pa.field(name, pa.string()) for name in ("id", "title", "source", "split", "reason", "seen")]
    with pq.ParquetWriter(run.artifact("removed.parquet"), pa.schema(fields)) as removed:
        for number, file in enumerate(sorted(documents.files)):
            left = []
            for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                table = pa.Table.from_batches([batch])
                stay, gone = apply(config, table)
                removed.write_table(pa.Table.from_pylist(gone, schema=pa.schema(fields)))
                for row in gone:
                    reasons[row["reason"], row["split"]] += 1
                    if len(examples.setdefault(row["reason"], [])) < EXAMPLES:
                        examples[row["reason"]].append(row)
                if stay.num_rows:
                    left.append(_redacted(config, stay, redacted))
            if left:
                table = pa.concat_tables(left)
                kept += table.num_rows
                pq.write_table(table, partial / f"part-{number:04d}.parquet", compression="zstd")
    if not kept:
        raise Failure(f"nothing is left: {sum(reasons.values()):,} documents were removed, see removed.parquet")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    totals = Counter(dict.fromkeys(config.remove, 0))
    for (reason, _), number in reasons.items():
        totals[reason] += number
    summary = {
        "documents": kept + sum(totals.values()),
        "kept": kept,
        "removed": sum(totals.values()),
        **{f"removed: {reason}": number for reason, number in totals.items()},
        **{f"redacted: {kind}": redacted[kind] for kind in config.redact},
        "fingerprint": version_of(open_audit(folder)),
    }
    _describe(run, summary, totals, reasons, examples)
    return summary


def apply(config: FilterConfig, table: "pa.Table") -> "tuple[pa.Table, list[dict[str, Any]]]":
    """(the rows that no rule removes, a row with the reason for each other one)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if config.splits:
        table = table.filter(pc.is_in(table["split"], pa.array(config.splits, pa.string())))
    why = np.full(table.num_rows, -1)
    rules = config.rules
    for place, rule in enumerate(rules):
        held = np.asarray(rule.holds(table))
        why[held & (why < 0)] = place
    rows = []
    for index in np.flatnonzero(why >= 0).tolist():
        row = {name: table[name][index].as_py() for name in ("id", "title", "source", "split")}
        rule = rules[why[index]]
        findings = {name: table[name][index].as_py() for name in rule.findings}
        rows.append({**row, "reason": rule.reason, "seen": rule.seen(findings)})
    return table.filter(pa.array(why < 0)), rows


def _redacted(config: FilterConfig, table: "pa.Table", count: Counter[str]) -> "pa.Table":
    """``table`` as documents that are kept: with the findings of ``redact`` blotted out, wherever the text stands."""
    import numpy as np
    import pyarrow as pa

    table = table.set_column(table.column_names.index("keep"), "keep", pa.array([True] * table.num_rows))
    if not config.redact:
        return table
    region = phone_region_of(table.schema)
    left = {kind: table[f"{kind}s"].to_numpy().copy() for kind in config.redact}
    texts, conversations = table["text"].to_pylist(), table["conversation"].to_pylist()
    columns: dict[str, Any] = {"text": texts, "conversation": conversations}
    for name in {"title", "label"} & set(table.column_names):  # a title is no document: nothing is counted there
        columns[name] = [redact(own, config.redact, region)[0] for own in table[name].to_pylist()]
    for place in np.flatnonzero(np.sum(list(left.values()), axis=0)).tolist():
        turns = json.loads(conversations[place]) if conversations[place] else []
        parts = [content for _, content in turns] or [texts[place]]
        parts, found = redact_parts(parts, config.redact, region)
        texts[place] = BETWEEN_PARTS.join(parts)
        if turns:
            turns = [[role, part] for (role, _), part in zip(turns, parts, strict=True)]
            conversations[place] = json.dumps(turns, ensure_ascii=False)
            if "label" in columns:
                columns["label"][place] = keys_of(turns)[2]
        for kind, number in found.items():
            count[kind] += number
            left[kind][place] -= min(number, left[kind][place])
    columns["characters"] = pa.array([len(text) for text in texts], pa.int32())
    columns |= {f"{kind}s": pa.array(numbers, pa.int32()) for kind, numbers in left.items()}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def _describe(
    run: Run, summary: Summary, totals: Counter[str], reasons: Counter[tuple[str, str]], examples: dict[str, Any]
) -> None:
    import plotly.graph_objects as go

    report = run.report
    names = ["kept", *totals]
    figure = go.Figure(go.Bar(x=names, y=[summary["kept"], *totals.values()]))
    figure.update_xaxes(type="category").update_yaxes(title="documents")
    report.figure("What became of the documents", figure, note="the first rule that holds gives the reason")
    rows = [
        {"reason": reason, "split": split, "documents": number}
        for (reason, split), number in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]
    report.table("Removed", rows, note="each of them is in artifacts/removed.parquet")
    for reason, shown in examples.items():
        report.table(
            f"Examples: {reason}", [{name: row[name] for name in ("title", "source", "seen")} for row in shown]
        )
