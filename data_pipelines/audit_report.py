"""The audit's page: how much there is, how long, in which languages, how much of it twice, and whose data."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from data_pipelines.audit_verdict import findings
from data_pipelines.corpus import Corpus
from data_pipelines.gates import Gate
from data_pipelines.pii import KINDS, redact
from data_pipelines.statistics import LENGTHS, OTHER_GROUPS, SHARES, Statistics
from workbench.report import Report

if TYPE_CHECKING:
    from data_pipelines.audit import AuditConfig

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SHOWN_LEAKS = 20
UNITS = {"asked_characters": "characters asked", "answer_characters": "characters answered"}


def describe(
    report: Report, corpus: Corpus, config: "AuditConfig", figures: dict[str, float], seconds: dict[str, float]
) -> None:
    """Add the sections to ``report``; ``seconds`` is the wall time of each step."""
    statistics = corpus.statistics
    if config.fail_on:
        rows = []
        for text in config.fail_on:
            gate = Gate.parse(text)
            passed = "no" if gate.crossed(figures) else "yes"
            rows.append({"gate": str(gate), "seen": figures[gate.name], "passed": passed})
        report.table("Gates", rows, note="the command ends with exit code 1 where one is not passed")
    report.table(
        "What to decide",
        findings(corpus, config.trained),
        note="a rule goes under 'remove' in the config of data filter, whose result has the reason of each removal; "
        "the sections below have the examples",
    )
    _documents(report, statistics)
    if len(corpus.index.splits) > 1:
        _leakage(report, corpus, config)
    _duplicates(report, statistics)
    if statistics.turns:
        _exchanges(report, statistics)
    _quality(report, statistics, config)
    report.heading("Personal and secret data")
    counts = [{"kind": kind, "found": count} for kind, count in sorted(statistics.personal.items())]
    report.table("Found", counts, note="numbers count only with a right checksum, length and prefix")
    if statistics.examples:
        report.table("Examples, masked", sorted(statistics.examples, key=lambda e: (e["kind"], e["source"])))
    report.heading("Quarantine and time")
    reasons = Counter(row["reason"] for row in corpus.quarantined)
    if reasons:
        report.table("Not read", [{"reason": reason, "rows": rows} for reason, rows in sorted(reasons.items())])
        report.table("First of them", corpus.quarantined[:10], note="all are in artifacts/quarantine.parquet")
    report.table(
        "Figures that a gate may name",
        [{"figure": name, "value": value} for name, value in figures.items()],
        note="shares are 0 to 1: leakage of the evaluation documents, the others of all; write fail_on: [leakage>0]",
    )
    report.table("Wall time, seconds", [{name: round(value, 1) for name, value in seconds.items()}])


def _documents(report: Report, statistics: Statistics) -> None:
    report.heading("Documents")
    lengths = statistics.lengths("characters")
    report.figure("Length", _histogram(lengths, "characters"), note="characters a document, on a logarithmic axis")
    rows = []
    for name in LENGTHS:
        values = statistics.lengths(name)
        if len(values):
            row: dict[str, Any] = {"a document's": UNITS.get(name, name), "documents": len(values)}
            row |= {f"p{p}": int(np.percentile(values, p)) for p in PERCENTILES}
            rows.append(row | {"longest": int(values.max()), "total": int(values.sum())})
    report.table("Percentiles of length", rows)
    if len(statistics.splits) > 1:
        report.table("Splits", [{"split": name, **_split_row(statistics, name)} for name in sorted(statistics.splits)])
    sizes = {name: np.concatenate(parts) for name, parts in statistics.groups.items()}
    top = sorted(sizes, key=lambda name: (-len(sizes[name]), name))[:20]
    documents = Counter({name: len(values) for name, values in sizes.items()})
    report.figure(
        "Sources", _sources(documents, 20), note="the twenty with the most documents, by the end of their names"
    )
    report.table(
        f"Length by source, characters ({len(top)} of {len(sizes)})",
        [
            {
                "source": name,
                "documents": len(sizes[name]),
                **{f"p{p}": int(np.percentile(sizes[name], p)) for p in (5, 50, 95)},
                "longest": int(sizes[name].max()),
                "total": int(sizes[name].sum()),
            }
            for name in top
        ],
    )
    report.table("Longest", [_shown(row) for row in statistics.longest])
    report.table("Shortest", [_shown(row) for row in statistics.shortest])
    report.figure(
        "Languages",
        _bars(statistics.languages, 12, logarithmic=True),
        note="as py3langid tells from the first 200 characters; und: it could not say. Short texts full of names are "
        "often taken for a wrong language, so read small counts as noise",
    )
    if len(statistics.scripts) > 1:
        scripts = [{"script": name, "documents": number} for name, number in statistics.scripts.most_common(10)]
        report.table("Writing systems", scripts, note="of most of the letters")


def _split_row(statistics: Statistics, split: str) -> dict[str, Any]:
    counts = statistics.splits[split]
    return {
        "documents": counts["documents"],
        "characters": counts["characters"],
        "kept": counts["kept"],
        "exact duplicates": counts["exact"],
        "near duplicates": counts["near"],
        "leaks": counts["leaks"],
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("characters", "title", "source", "text")}


def _leakage(report: Report, corpus: Corpus, config: "AuditConfig") -> None:
    evaluated = ", ".join(config.evaluated)
    report.heading("Leakage", f"what of {evaluated} is in {', '.join(config.trained)}")
    kinds = Counter(leak["kind"] for leak in corpus.leaks)
    report.table(
        "Evaluation documents that leak",
        [
            {
                "evaluation documents": corpus.evaluation_documents,
                "leaking": len(corpus.leaks),
                "exact": kinds["exact"],
                "near duplicates": kinds["near"],
                f"a run of {config.ngram} words": kinds["ngram"],
                "shorter than a run": corpus.without_runs,
            }
        ],
        note="each is counted once, under the first kind that holds; one shorter than a run is only compared whole",
    )
    for number, leak in enumerate(corpus.leaks[:SHOWN_LEAKS], 1):
        rows = [
            {
                "side": f"{side}: {leak[f'{side}_split']}",
                "id": leak[f"{side}_id"],
                "before": redact(leak[f"{side}_before"], KINDS)[0],
                "the same words": redact(leak[f"{side}_span"], KINDS)[0],
                "after": redact(leak[f"{side}_after"], KINDS)[0],
            }
            for side in ("evaluation", "training")
        ]
        name = f"{number}. {leak['kind']}, {leak['words']} words in a row, similarity {leak['similarity']:g}"
        report.table(name, rows)
    if len(corpus.leaks) > SHOWN_LEAKS:
        report.text("The others", f"all {len(corpus.leaks):,} are in artifacts/leaks.parquet")


def _duplicates(report: Report, statistics: Statistics) -> None:
    report.heading("Duplicates")
    report.table(
        "What is kept",
        [
            {
                "documents": statistics.documents,
                "kept": statistics.kept,
                "exact duplicates": statistics.kinds["exact"],
                "near duplicates": statistics.kinds["near"],
                "kept, %": round(100 * statistics.kept / statistics.documents, 1),
            }
        ],
        note="exact: the same words in the same order; near: Jaccard similarity of 3-word shingles over the threshold "
        "to the document that is kept",
    )
    if statistics.largest:
        report.table("Ten largest clusters", statistics.largest, note="copies besides the document that is kept")


def _exchanges(report: Report, statistics: Statistics) -> None:
    report.heading("Instructions", "the screens go by phrases: leads to read, not verdicts")
    flags = [{"finding": name, "exchanges": number} for name, number in statistics.flags.most_common()]
    flags.append({"finding": "conflicting answers to one question", "exchanges": statistics.conflicts})
    report.table("Findings", flags, note="the column 'flags' of artifacts/documents names them for each exchange")
    answers = statistics.lengths("answer_characters")
    report.figure("Answers", _histogram(np.maximum(answers, 1), "characters"), note="characters answered")
    turns = Counter({str(number): count for number, count in statistics.turns.items()})
    report.figure("Turns of the user", _bars(turns, 20))
    distinct = len(statistics.labels)
    if statistics.labelled > statistics.documents / 2 and distinct < statistics.labelled / 2:
        report.figure("Labels", _bars(statistics.labels, 30), note=f"{distinct:,} different short answers")
        most = statistics.labels.most_common(1)[0]
        share = round(100 * most[1] / statistics.labelled, 1)
        report.table("Balance", [{"labels": distinct, "most frequent": most[0], "its share, %": share}])


def _quality(report: Report, statistics: Statistics, config: "AuditConfig") -> None:
    report.heading("Quality", "rules made for English web pages: what breaks one is worth a look, and no more")
    rows = [
        {"rules": name, "rule": rule, "documents": number, "share, %": round(100 * number / statistics.documents, 2)}
        for name, rules in statistics.broken.items()
        for rule, number in sorted(rules.items(), key=lambda item: (item[0] != "any", -item[1], item[0]))
        if number
    ]
    papers = "Gopher: Rae et al. 2021, arXiv 2112.11446; C4: Raffel et al. 2020, arXiv 1910.10683"
    report.table("Rules broken", rows, note=papers)
    characters = statistics.lengths("characters").sum()
    report.table(
        "Language and encoding",
        [
            {
                "distinct words, about": statistics.distinct_words,
                "words": int(statistics.lengths("words").sum()),
                "characters": int(characters),
                "with encoding damage": statistics.mojibake,
                "with boilerplate phrases": statistics.boilerplate,
            }
        ],
    )
    shown = []
    for name in SHARES:
        values = statistics.lengths(name)
        if len(values):
            shown.append({"finding": name} | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES})
    note = "" if config.repetition else "n-grams were not counted: repetition is off"
    report.table("Distribution of findings", shown, note=note)
    compression = statistics.lengths("compression")
    counts, edges = np.histogram(np.minimum(compression, 8), 64, (0, 8))
    figure = go.Figure(go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=counts))
    figure.update_xaxes(title="bytes over compressed bytes").update_yaxes(title="documents", type="log")
    report.figure("Compression", figure, note="texts far to the right repeat themselves; 8 stands for 8 and more")


def _histogram(lengths: np.ndarray, unit: str) -> go.Figure:
    edges = np.logspace(np.log10(max(1, lengths.min())), np.log10(lengths.max() + 1), 60)
    counts, _ = np.histogram(lengths, edges)
    centres = np.sqrt(edges[1:] * edges[:-1])
    figure = go.Figure(go.Bar(x=centres, y=counts, width=np.diff(edges)))
    figure.update_xaxes(type="log", title=unit)
    figure.update_yaxes(title="documents")
    return figure


def _sources(counts: Counter[str], most: int) -> go.Figure:
    """Lying bars, the largest on top: sources have long names, of which the end tells most."""
    top = [item for item in counts.most_common(most + 1) if item[0] != OTHER_GROUPS][:most][::-1]
    names = [name if len(name) <= 48 else f"…{name[-47:]}" for name, _ in top]
    figure = go.Figure(go.Bar(y=names, x=[count for _, count in top], orientation="h"))
    figure.update_xaxes(title="documents").update_yaxes(type="category", automargin=True)
    return figure.update_layout(height=120 + 24 * len(top))


def _bars(counts: Counter[str], most: int, logarithmic: bool = False) -> go.Figure:
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    figure = go.Figure(go.Bar(x=[name for name, _ in top], y=[count for _, count in top]))
    figure.update_yaxes(title="documents", type="log" if logarithmic else "linear")
    figure.update_xaxes(type="category")
    return figure
