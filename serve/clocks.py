"""How far a server's clock is from ours, by the ``Date`` of its answers (RFC 9110), which ticks once a second.

Latencies need no such agreement, for both ends of each are taken here; a timeline of the server beside them does.
"""

import time
from email.utils import parsedate_to_datetime

import httpx

SECONDS = 2.5
"""Long enough to see the date tick twice."""


def clock_offset(url: str) -> tuple[float, float] | None:
    """Seconds that the server's clock is ahead of ours, and how far that can be off; None where it tells no date.

    Asked over and over, an answer with date D that came between our times a and b bounds the offset: D - b is below
    it, D + 1 - a above. A server that renews its date once a second may tell one that is a second old.
    """
    low, high = float("-inf"), float("inf")
    ends = time.monotonic() + SECONDS
    with httpx.Client(timeout=5) as client:
        while time.monotonic() < ends:
            before = time.time()
            try:
                told = client.get(url).headers.get("date")
            except httpx.HTTPError:
                return None
            after = time.time()
            if not told:
                return None
            try:
                date = parsedate_to_datetime(told).timestamp()
            except ValueError:
                return None
            low, high = max(low, date - after), min(high, date + 2 - before)
            time.sleep(0.02)
    return (low + high) / 2, max(0.0, (high - low) / 2)
