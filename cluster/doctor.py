"""``workbench cluster doctor``: what is wrong with the machines, and what to type.

    for row in diagnose(inventory, examine(inventory)):
        print(row.host, row.check, row.state)

It changes nothing: ports it opens are closed again, files it writes are removed.
"""

from collections.abc import Iterator

from cluster import doctor_cards, doctor_checks, doctor_trials
from cluster.doctor_row import STATES, Row
from cluster.examination import Seen
from cluster.inventory import Inventory


def diagnose(inventory: Inventory, seen: Seen) -> list[Row]:
    """Every row of every check, host by host in the inventory's order."""
    checks = [*doctor_checks.CHECKS, *doctor_cards.CHECKS, *doctor_trials.CHECKS]
    rows = [row for check in checks for row in check(inventory, seen)]
    order = list(inventory.hosts)
    return sorted(rows, key=lambda row: order.index(row.host))


def count(rows: list[Row]) -> dict[str, int]:
    """How many rows there are of each state."""
    return {state: sum(row.state == state for row in rows) for state in STATES}


def table(rows: list[Row], color: bool = False) -> Iterator[str]:
    """The rows as lines for a terminal: one a check, what was expected and what to type below it if it is not ok."""
    width = max((len(row.check) for row in rows), default=0)
    host = ""
    for row in rows:
        if row.host != host:
            host = row.host
            yield f"\n{host}"
        yield f"  {_painted(row.state, color)} {row.check:<{width}}  {row.seen}"
        if row.state != "ok":
            indent = " " * (width + 12)
            if row.expected:
                yield f"{indent}expected: {row.expected}"
            yield f"{indent}type:     {row.remedy}"
    total = count(rows)
    yield f"\n{total['failed']} failed, {total['warning']} warnings, {total['ok']} ok"


def _painted(state: str, color: bool) -> str:
    code = {"ok": 32, "warning": 33, "failed": 31}[state]
    return f"\033[{code}m{state:<7}\033[0m" if color else f"{state:<7}"
