"""Reports: one file that opens without a network, and shows what it was given and nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from workbench.report import Report


class Page(HTMLParser):
    """Collects the addresses a browser would fetch, and the text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.shown: list[str] = []
        self.tags: list[str] = []
        self._within: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        loads = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}
        if tag in loads and attributes.get(loads[tag]):
            self.fetched.append(str(attributes[loads[tag]]))
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within and data.strip():
            self.shown.append(data.strip())


@pytest.fixture
def html(tmp_path: Path) -> str:
    report = Report(title="workbench data audit", summary={"documents": 12345, "clean": True, "rate": 0.123456})
    report.heading("Sources", "two of them")
    report.text("Notes", "first line\nsecond <script>alert(1)</script>")
    report.table("Lengths", [{"name": "a<b", "mean": 1.5}, {"name": "c", "mean": None}])
    report.figure("Curve", go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="</script><b>x")), note="lower is better")
    report.links("Runs", {"audit": "../audit/report.html"})
    report.write(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_the_page_fetches_nothing(html: str) -> None:
    assert Page(html).fetched == []
    assert not re.search(r"@import|url\(\s*['\"]?https?:", html.split("<script>")[0])


def test_the_page_shows_what_it_was_given(html: str) -> None:
    shown = Page(html).shown
    for text in ("workbench data audit", "12,345", "yes", "0.1235", "Sources", "two of them", "a<b", "lower is better"):
        assert text in shown


def test_text_cannot_become_markup(html: str) -> None:
    page = Page(html)
    assert any("<script>alert(1)</script>" in text for text in page.shown)
    assert "b" not in page.tags


def test_a_page_without_figures_is_small(tmp_path: Path) -> None:
    report = Report(title="t")
    report.table("Empty", [])
    report.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 20_000
    assert "script" not in Page((tmp_path / "report.html").read_text()).tags


def test_a_report_can_include_the_figures_of_another(tmp_path: Path, html: str) -> None:
    whole = Report(title="whole")
    whole.include(tmp_path / "report.json")
    whole.write(tmp_path / "whole.html")
    shown = Page((tmp_path / "whole.html").read_text()).shown
    assert "Curve" in shown and "Lengths" not in shown
