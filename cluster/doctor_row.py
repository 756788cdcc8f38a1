"""One line of the doctor's table."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]
STATES: tuple[State, ...] = ("ok", "warning", "failed")
GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """What one check saw on one host, what it expected, and, unless that is the same, what to type."""

    host: str
    check: str
    state: State
    seen: str
    expected: str = ""
    remedy: str = ""


def worst(states: list[State]) -> State:
    """The most serious of ``states``; ok of none."""
    return max(states, key=STATES.index, default="ok")


def gib(size: int | None) -> str:
    """Bytes as a person reads them."""
    return "unknown" if size is None else f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"
