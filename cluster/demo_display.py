"""What the demo shows while it runs: a line per stage, its time, and what it has found so far.

On a terminal the lines live in place; elsewhere each change is a line of its own. All of it goes to stderr.
"""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

MARKS = {"waiting": " ", "running": "…", "done": "✓", "reused": "=", "skipped": "-"}


@dataclass
class Line:
    """One stage on the screen."""

    title: str
    state: str = "waiting"
    found: str = ""
    began: float = 0.0
    seconds: float = 0.0


class Display:
    """A context manager that shows ``titles`` as lines; call ``begin``, ``found`` and ``end`` with a line's index."""

    def __init__(self, titles: list[str]) -> None:
        self.lines = [Line(title) for title in titles]
        self._console = Console(stderr=True)
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
        self._in_place = self._console.is_terminal

    def __enter__(self) -> "Display":
        if self._in_place:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_place:
            self._live.stop()

    def begin(self, index: int) -> None:
        """Stage ``index`` runs now."""
        line = self.lines[index]
        line.state, line.began = "running", time.monotonic()
        self._say(f"[{index + 1}/{len(self.lines)}] {line.title}")

    def found(self, index: int, text: str) -> None:
        """What stage ``index`` has found so far."""
        line = self.lines[index]
        if text and text != line.found:
            line.found = text
            self._say(f"    {text}")

    def end(self, index: int, state: str, text: str) -> None:
        """Stage ``index`` ended as ``done``, ``reused`` or ``skipped``; ``text`` is its result in a line."""
        line = self.lines[index]
        line.seconds = time.monotonic() - line.began if line.began else 0.0
        line.state, line.found = state, text
        self._say(f"    {state} in {line.seconds:.0f} s: {text}" if line.began else f"{line.title}: {state}. {text}")

    def _say(self, text: str) -> None:
        if not self._in_place:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for line in self.lines:
            seconds = time.monotonic() - line.began if line.state == "running" else line.seconds
            clock = f"{seconds:.0f} s" if seconds else ""
            table.add_row(MARKS[line.state], line.title, clock, line.found.replace("[", "\\["))
        return table
