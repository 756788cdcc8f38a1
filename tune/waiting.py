"""Trials that were placed and whose process has not begun: one whose host is gone is placed anew.

Ray would let it wait for ever, and so would Ray Tune.
"""

import time

from cluster.nodes import member_nodes
from tune.orders import Orders
from tune.places import Place, Places
from workbench.errors import UserError
from workbench.runs import Run

PATIENCE_SECONDS = 60.0
"""After so long without room, hosts are looked at again: a trial's own may be gone, or be back."""


class Waiting:
    """Of a sweep on ``places``; where no host is left, its ``orders`` are to pause."""

    def __init__(self, places: Places, orders: Orders, run: Run) -> None:
        self._places, self._orders, self._run = places, orders, run
        self._since: dict[int, float] = {}
        self._placed: dict[int, Place] = {}
        self._moves: set[int] = set()
        self._looked = time.monotonic()

    def add(self, number: int, place: Place) -> None:
        """A trial was given ``place`` and waits for its process."""
        self._since[number], self._placed[number] = time.monotonic(), place

    def remove(self, number: int) -> Place | None:
        """A trial waits no more; where it was to begin, None if it did not wait."""
        self._since.pop(number, None)
        return self._placed.pop(number, None)

    def in_vain(self, number: int) -> bool:
        """Whether a trial's host is gone, as far as that was looked for again."""
        if time.monotonic() - self._since.get(number, time.monotonic()) < PATIENCE_SECONDS:
            return False
        self._since[number] = time.monotonic()
        if not self._has_hosts(f"no host is left for trial {number}"):
            return True
        if self._places.is_gone(number):
            self._run.say(f"trial {number} is placed anew: the host that it waited for is gone")
            self._moves.add(number)
            return True
        waits = self._places.waits
        self._run.say(f"trial {number} has no room yet{': ' * bool(waits)}{waits}")
        return False

    def moves(self, number: int) -> bool:
        """Whether a trial that waited in vain is to be placed anew. Told once."""
        moves = number in self._moves
        self._moves.discard(number)
        return moves

    def lacks_host(self, why: str, *, alone: bool) -> None:
        """A trial cannot be placed, because of ``why``: its host may be back; where no other runs, the sweep pauses."""
        if time.monotonic() - self._looked >= PATIENCE_SECONDS:
            self._has_hosts(why)
        elif alone:
            self._orders.pause(why)

    def _has_hosts(self, otherwise: str) -> bool:
        """See which hosts are up; where none can hold any trial, the sweep pauses for the reason ``otherwise``."""
        self._looked = time.monotonic()
        try:
            self._places.refresh(member_nodes())
        except UserError as error:
            self._orders.pause(f"{otherwise}: {error}")
            return False
        return True
