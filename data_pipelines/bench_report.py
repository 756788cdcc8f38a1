"""What a search benchmark found, drawn: recall against latency, and whether the target is met."""

from typing import TYPE_CHECKING, Any

from workbench.report import Report

if TYPE_CHECKING:
    from data_pipelines.bench import BenchConfig

REMEDY = "use a Milvus server (docs/operations.md, 'A Milvus server'): the same commands with uri=http://HOST:19530"


def draw(
    report: Report, points: list[dict[str, Any]], indexes: list[dict[str, Any]], origin: str, limit: int,
    target_ms: float,
) -> None:  # fmt: skip
    """The figure, and the tables behind it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for kind in dict.fromkeys(point["index"] for point in points):
        mine = [point for point in points if point["index"] == kind]
        figure.add_scatter(
            x=[point["recall"] for point in mine],
            y=[point["p95_ms"] or point["p50_ms"] for point in mine],
            text=[str(point["effort"] or "exact") for point in mine],
            name=kind,
            mode="lines+markers+text",
            textposition="top center",
        )
    figure.add_hline(y=target_ms, line_dash="dot", annotation_text=f"target {target_ms:g} ms")
    figure.update_xaxes(title=f"recall@{limit}").update_yaxes(title="p95 of one client, ms", type="log")
    report.figure(
        "Recall against latency", figure,
        note=f"{origin}; numbers at the points: ef of HNSW, nprobe of IVF; right and low is better",
    )  # fmt: skip
    report.table("Searches by one client", points, note="p95 from 20 searches on, p99 from 100 on")
    report.table(
        "Indexes",
        [{key: value for key, value in row.items() if key != "together"} for row in indexes],
        note="at the least effort that reaches the target recall; added: our search over a bare pymilvus call, query "
        "by query, its median and quarters; memory of Milvus' process, disk after this index was built",
    )
    if all("together" in row for row in indexes):
        rows = [{"index": row["index"], "effort": row["effort"], **row["together"]} for row in indexes]
        report.table("Several clients at once", rows)


def verdict(points: list[dict[str, Any]], config: "BenchConfig", *, lite: bool) -> str:
    """Whether an index meets the targets at this size, and what to do if none does."""
    met = [
        point
        for point in points
        if point["recall"] >= config.target_recall and (point["p95_ms"] or float("inf")) <= config.target_ms
    ]
    wanted = f"p95 under {config.target_ms:g} ms at recall {config.target_recall:g}"
    if met:
        best = min(met, key=lambda point: float(point["p95_ms"]))
        return (
            f"{config.rows:,} rows: {best['index']} {best['effort'] or ''} has {wanted}: "
            f"p95 {best['p95_ms']} ms, recall {best['recall']}"
        )
    exact_enough = [point for point in points if point["recall"] >= config.target_recall and point["p95_ms"]]
    if not exact_enough:
        return f"{config.rows:,} rows: no index reaches recall {config.target_recall:g} with these efforts: raise them"
    best = min(exact_enough, key=lambda point: float(point["p95_ms"]))
    said = f"{config.rows:,} rows: none has {wanted}; the best is {best['index']} with p95 {best['p95_ms']} ms"
    if not lite:
        return f"{said}; give the server more cores, or lower the effort"
    about = int(config.rows * config.target_ms / float(best["p95_ms"]))
    return f"{said}. Milvus Lite looks at every key, so about {about:,} rows would (an estimate). Beyond: {REMEDY}"
