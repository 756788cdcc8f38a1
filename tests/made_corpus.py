"""Audits of made rows, in this process: what ``data audit`` does between reading and reporting, without Ray."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_pipelines.corpus import Corpus
from data_pipelines.measure import Measures, measure
from data_pipelines.sources import Row, read_blocks


class Rows:
    """Rows as an item of a source."""

    size = 1

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    def rows(self) -> Iterator[Row]:
        yield from self._rows


def audited(
    folder: Path,
    splits: dict[str, list[Row]],
    *,
    evaluation: tuple[str, ...] = (),
    threshold: float = 0.8,
    measures: Measures | None = None,
    blocks: int = 1,
) -> Corpus:
    """The finished Corpus of these rows, each split cut into ``blocks`` batches; its files are in ``folder``."""
    measures = measures or Measures(exchanges=any(row.conversation for rows in splits.values() for row in rows))
    if evaluation:
        measures = replace(measures, gram=measures.gram or 13)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(folder / "documents", folder / "quarantine.parquet")
    with corpus:
        for split in sorted(splits, key=lambda name: name not in evaluation):
            own = measures
            if evaluation and split not in evaluation:
                own = replace(measures, evaluation=corpus.evaluation_hashes())
            size = max(1, -(-len(splits[split]) // blocks))
            for start in range(0, len(splits[split]), size):
                for batch in read_blocks([Rows(splits[split][start : start + size])], split):
                    corpus.add(measure(batch, own), evaluation=split in evaluation)
        corpus.compare(threshold, evaluation)
        corpus.write(measures.phone_region)
    return corpus
