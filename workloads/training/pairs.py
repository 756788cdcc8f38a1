"""A preference pair as one row: two examples, what was chosen and then what was rejected.

As one row a pair stays together however a batch is cut, over ranks as over micro batches, and is counted, ordered and
resumed as any row is. It is never a forward pass's sequence: ``halves`` takes it apart first.
"""

from collections.abc import Sequence
from dataclasses import replace

from workloads.training.batches import MadeRows, Row, join, lengths_of


def halves(row: Row) -> tuple[Row, Row]:
    """The chosen and the rejected sequence of a pair."""
    _, start = row.starts
    return Row(row.ids[:start], row.labels[:start]), Row(row.ids[start:], row.labels[start:])


class Pairs(MadeRows):
    """``rows`` two by two: chosen, rejected, chosen, rejected."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, own = rows, lengths_of(rows)
        self.lengths = [chosen + rejected for chosen, rejected in zip(own[::2], own[1::2], strict=True)]

    def row(self, place: int) -> Row:
        """The row at ``place``, from 0."""
        chosen, rejected = self._rows[2 * place], self._rows[2 * place + 1]
        return replace(join([chosen, rejected]), sources=chosen.sources)
