"""The audit's page: how much there is, how long, in which languages, how much of it twice, and whose data."""

from collections import Counter

import numpy as np
import plotly.graph_objects as go

from data_pipelines.corpus import Corpus
from workbench.report import Report

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def describe(report: Report, corpus: Corpus, seconds: dict[str, float]) -> None:
    """Add the sections to ``report``; ``seconds`` is the wall time of each step."""
    report.heading("Documents")
    lengths = np.array(corpus.lengths)
    report.figure("Length", _histogram(lengths), note="characters a document, on a logarithmic axis")
    row = {f"p{p}": int(np.percentile(lengths, p)) for p in PERCENTILES}
    report.table("Length percentiles, characters", [{"documents": len(lengths), **row, "longest": int(lengths.max())}])
    report.figure("Sources", _bars(corpus.packages, 20), note="the twenty with the most documents")
    report.figure(
        "Languages",
        _bars(corpus.languages, 12, logarithmic=True),
        note="as py3langid tells from the first 200 characters; und: it could not say. Short texts full of names are "
        "often taken for a wrong language, so read small counts as noise",
    )
    report.heading("Duplicates")
    report.table(
        "What is kept",
        [
            {
                "documents": corpus.documents,
                "kept": corpus.kept,
                "exact duplicates": corpus.exact_duplicates,
                "near duplicates": corpus.near_duplicates,
                "kept, %": round(100 * corpus.kept / corpus.documents, 1),
            }
        ],
        note="exact: the same words in the same order; near: Jaccard similarity of 3-word shingles over the threshold "
        "to the document that is kept",
    )
    if corpus.largest:
        report.table("Ten largest clusters", corpus.largest, note="copies besides the document that is kept")
    report.heading("Personal data")
    counts = [{"kind": kind, "found": count} for kind, count in sorted(corpus.personal.items())]
    report.table("Found", counts, note="numbers count only with a right checksum, length and prefix")
    if corpus.examples:
        report.table("Examples, masked", sorted(corpus.examples, key=lambda e: (e["kind"], e["source"])))
    report.heading("Quarantine and time")
    reasons = Counter(row["reason"] for row in corpus.quarantined)
    if reasons:
        report.table("Not read", [{"reason": reason, "rows": rows} for reason, rows in sorted(reasons.items())])
        report.table("First of them", corpus.quarantined[:10], note="all are in artifacts/quarantine.parquet")
    report.table("Wall time, seconds", [{name: round(value, 1) for name, value in seconds.items()}])


def _histogram(lengths: np.ndarray) -> go.Figure:
    edges = np.logspace(0, np.log10(lengths.max() + 1), 60)
    counts, _ = np.histogram(lengths, edges)
    centres = np.sqrt(edges[1:] * edges[:-1])
    figure = go.Figure(go.Bar(x=centres, y=counts, width=np.diff(edges)))
    figure.update_xaxes(type="log", title="characters")
    figure.update_yaxes(title="documents")
    return figure


def _bars(counts: Counter[str], most: int, logarithmic: bool = False) -> go.Figure:
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    figure = go.Figure(go.Bar(x=[name for name, _ in top], y=[count for _, count in top]))
    figure.update_yaxes(title="documents", type="log" if logarithmic else "linear")
    figure.update_xaxes(type="category")
    return figure
