"""Batches of rows that are still being tokenized, dealt window by window, from any step on.

    dealer = StreamDealer(count, Deal(batch_size=16, seed=0), source, ledger)
    dealer.batch(137)

``source`` tokenizes rows by their numbers. Where the windows begin is written to ``ledger``: training that begins again
in the middle of an epoch goes on from its last window, not from its first.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import UserError
from workbench.row_file import RowFile, read_rows
from workloads.encoding import Counts
from workloads.tokenized import row_of
from workloads.training.batches import Row, join
from workloads.training.dealing import Deal, Epoch

KEPT_BATCHES = 4
"""Ranks ask for a step a little before or after each other."""
KEPT_SOURCES = 1024
"""Steps whose documents can be named when the loss has run away."""

Part = tuple[Any, list[Counts]]
"""Some rows: an Arrow batch of those that can be learned from, and what became of each, those left out as well."""

Source = Callable[[Sequence[int]], Iterator[Part]]
"""Tokenizes the rows of these numbers, in this order, a part at a time."""


@dataclass(frozen=True)
class Told:
    """What has become of the rows of the first epoch, as far as it was dealt, and how many ``tokens`` and ``sequences``
    were dealt in all."""

    counts: Counts
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Mark:
    """Where a window begins: the ``step`` of its first batch, the ``place`` of its first row in the epoch's order, and
    the places of the rows of the sequences that were left by the window before."""

    step: int = 0
    epoch: int = 0
    window: int = 0
    place: int = 0
    left: tuple[tuple[int, ...], ...] = ()
    counts: Counts = field(default_factory=Counts)
    tokens: int = 0
    sequences: int = 0

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Mark":
        """What ``asdict`` made a row of a ledger."""
        left = tuple(tuple(each) for each in row["left"])
        return cls(**{**row, "left": left, "counts": Counts(**row["counts"])})


@dataclass(frozen=True)
class Held:
    """A tokenized row: its place in the epoch's order, where it is, and its tokens."""

    place: int
    batch: Any
    within: int
    length: int


class StreamDealer:
    """Deals the batches of ``count`` rows."""

    def __init__(self, count: int, deal: Deal, source: Source, ledger: Path) -> None:
        self._count, self._deal, self._source, self._ledger = count, deal, source, RowFile(ledger)
        self._made: dict[int, list[Row]] = {}
        self._sources: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=KEPT_SOURCES)
        self._steps: Iterator[list[Row]] = iter(())
        self._next = -1  # the step that ``_steps`` gives
        self._mark = Mark()
        self._seen, self._place = Counts(), 0  # of the rows that the windows have taken so far

    def batch(self, step: int) -> list[Row]:
        """The batch of ``step``. Raises UserError where the rows fill no batch."""
        if step in self._made:
            return self._made[step]
        if not 0 <= self._next <= step or step > self._next + KEPT_BATCHES:
            self._made.clear()
            mark = self._before(step)
            self._next, self._steps = mark.step, self._from(mark)
        while step not in self._made:
            self._made[self._next] = made = self._dealt()
            self._sources.append((self._next, tuple(name for row in made for name in row.sources)))
            self._made.pop(self._next - KEPT_BATCHES, None)
            self._next += 1
        return self._made[step]

    def _dealt(self) -> list[Row]:
        try:
            return next(self._steps)
        except Exception:
            self._next = -1  # a generator that raised is at its end: who asks again hears the same
            raise

    def sources(self, step: int) -> tuple[str, ...]:
        """The documents of the batch of ``step``."""
        known = dict(self._sources)
        return known[step] if step in known else tuple(name for row in self.batch(step) for name in row.sources)

    def told(self) -> Told:
        """What is known up to the last window that was begun."""
        return Told(self._mark.counts, self._mark.tokens, self._mark.sequences)

    def _before(self, step: int) -> Mark:
        marks = [Mark.of_row(row) for row in read_rows(self._ledger.path)]
        return max((mark for mark in marks if mark.step <= step), key=lambda mark: mark.step, default=Mark())

    def _from(self, mark: Mark) -> Iterator[list[Row]]:
        """The batches from that of ``mark`` on, epoch after epoch."""
        while True:
            self._mark = mark
            epoch = Epoch(self._deal, self._count, mark.epoch)
            rows, left = self._rows(epoch.order, mark), self._again(epoch.order, mark.left)
            for window in epoch.windows(rows, lambda row: row.length, mark.window, left):
                dealt = [row for batch in window.batches for sequence in batch for row in sequence]
                mark = Mark(
                    mark.step + len(window.batches), mark.epoch, window.number + 1, self._place,
                    tuple(tuple(row.place for row in sequence) for sequence in window.left), self._seen,
                    mark.tokens + sum(row.length for row in dealt),
                    mark.sequences + len(window.batches) * self._deal.batch_size,
                )  # fmt: skip
                self._write(mark)
                for batch in window.batches:
                    yield [self._sequence(each) for each in batch]
            if not mark.step:
                raise UserError(
                    f"{self._seen.rows} of {self._count} training rows have an answer to learn, which fill no batch: "
                    "are the roles right, is train_on what you want, is batch_size too large?"
                )
            mark = Mark(mark.step, mark.epoch + 1, 0, 0, (), self._seen, mark.tokens, mark.sequences)
            self._write(mark)

    def _write(self, mark: Mark) -> None:
        self._mark = mark
        self._ledger.add(asdict(mark))

    def _sequence(self, rows: Sequence[Held]) -> Row:
        made = [row_of(row.batch, row.within) for row in rows]
        return join(made) if self._deal.capacity else made[0]

    def _rows(self, order: Sequence[int], mark: Mark) -> Iterator[Held]:
        """The rows of ``order`` from that of ``mark`` on that can be learned from; counted in the first epoch."""
        self._seen, self._place = mark.counts, mark.place
        for batch, counts in self._source(order[mark.place :]):
            sizes = np.diff(batch.column("ids").offsets.to_numpy())
            within = 0
            for count in counts:
                self._seen += Counts() if mark.epoch else count
                self._place += 1
                if count.rows:
                    yield Held(self._place - 1, batch, within, int(sizes[within]))
                    within += 1

    def _again(self, order: Sequence[int], left: Sequence[Sequence[int]]) -> list[list[Held]]:
        """The sequences that were ``left``, tokenized anew."""
        places = [place for sequence in left for place in sequence]
        found: dict[int, Held] = {}
        for batch, counts in self._source([order[place] for place in places]):
            sizes = np.diff(batch.column("ids").offsets.to_numpy())
            for within in range(len(counts)):
                place = places[len(found)]
                found[place] = Held(place, batch, within, int(sizes[within]))
        return [[found[place] for place in sequence] for sequence in left]
