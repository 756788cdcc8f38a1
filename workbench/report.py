"""One HTML file per run: tables and Plotly figures, readable without a network.

report.figure("Loss", fig, note="lower is better")
report.write(run.folder / "report.html")
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import read_json, write_atomic, write_json
from workbench.redact import redact

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass
class Report:
    """Sections in the order they were added, under a title and the run's summary."""

    title: str
    summary: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, title: str, note: str = "") -> None:
        """Begin a part of the report; ``note`` is a sentence under it."""
        self.sections.append({"kind": "heading", "title": title, "note": note})

    def text(self, title: str, body: str) -> None:
        """A paragraph of plain text; line breaks are kept."""
        self.sections.append({"kind": "text", "title": title, "body": body})

    def table(self, title: str, rows: list[dict[str, Any]], note: str = "") -> None:
        """A table: one dict a row, the first row's keys as columns."""
        columns = list(rows[0]) if rows else []
        cells = [[_cell(row.get(column)) for column in columns] for row in rows]
        self.sections.append({"kind": "table", "title": title, "columns": columns, "cells": cells, "note": note})

    def figure(self, title: str, figure: "go.Figure", note: str = "") -> None:
        """A Plotly figure, interactive in the page."""
        figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 50})
        html = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
        self.sections.append({"kind": "figure", "title": title, "html": html, "note": note})

    def links(self, title: str, targets: dict[str, str], note: str = "") -> None:
        """Named links, relative to the report's folder."""
        self.sections.append({"kind": "links", "title": title, "targets": targets, "note": note})

    def include(self, other: Path, tables: tuple[str, ...] = ()) -> None:
        """Append another report's figures and texts, and its tables whose title begins so, from its ``report.json``."""
        self.sections += [
            section
            for section in read_json(other)["sections"]
            if section["kind"] in ("figure", "text")
            or (section["kind"] == "table" and tables and section["title"].startswith(tables))
        ]

    def write(self, path: Path) -> None:
        """Render to ``path``, atomically, and the sections to ``report.json`` beside it for reports that gather others.

        Secrets are masked. plotly.js is inlined only where a figure needs it.
        """
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("workbench"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        script = ""
        if any(section["kind"] == "figure" for section in self.sections):
            from plotly.offline import get_plotlyjs

            script = get_plotlyjs()
        report = Report(self.title, redact(self.summary), redact(self.sections))
        summary = {key: _cell(value) for key, value in report.summary.items()}
        page = environment.get_template("report.html.j2").render(report=report, summary=summary, plotly=script)
        write_atomic(path, page)
        write_json(path.with_suffix(".json"), {"title": report.title, "sections": report.sections})


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
