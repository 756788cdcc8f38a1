"""datatrove's part of ``benchmarks.audit_peers``; runs in an environment of its own: INPUT OUTPUT WORKERS.

Its statistics of documents, lines, paragraphs and words, Gopher's rules with limits that nothing crosses (a filter ends
at the first rule that is broken), e-mail and IP addresses, exact duplicates, and near duplicates by MinHash with the
audit's shingles.
"""

import sys
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.stats import DocStats, LineStats, ParagraphStats, WordStats
from datatrove.pipeline.writers import ParquetWriter

NEVER = 2.0
SHINGLE = 3
BANDS, ROWS = 14, 8
"""datatrove's own: with more bands of fewer rows, as the audit has, it would remove what is not alike, for it does not
compare the candidates."""


def text_of(document) -> str:  # type: ignore[no-untyped-def]
    """What exact duplicates are equal in."""
    return str(document.text)


def main(source: str, out: Path, workers: int) -> None:
    """Run the stages one after the other, ``workers`` processes each."""
    files = len(list(Path(source).glob("*.parquet")))

    def execute(*steps, tasks: int = files) -> None:  # type: ignore[no-untyped-def]
        executor = LocalPipelineExecutor(
            [*steps], tasks=tasks, workers=workers, logging_dir=str(out / f"log-{len(done)}")
        )
        executor.run()
        done.append(executor)

    done: list[LocalPipelineExecutor] = []
    read = ParquetReader(source, glob_pattern="*.parquet")
    exact = ExactDedupConfig(content_getter=text_of, only_dedup_in_index=False)
    near = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    execute(
        read,
        *(
            kind(str(out / kind.__name__), groups_to_compute=["summary", "histogram"])
            for kind in (DocStats, LineStats, ParagraphStats, WordStats)
        ),
        GopherRepetitionFilter(
            NEVER, NEVER, NEVER, NEVER, tuple((n, NEVER) for n in (2, 3, 4)), tuple((n, NEVER) for n in range(5, 11))
        ),
        GopherQualityFilter(1, 10**9, 1e-9, 10**9, 10**9, NEVER, NEVER, 1e-9, 0),
        PIIFormatter(),
        ExactDedupSignature(str(out / "exact"), exact),
    )
    execute(ExactFindDedups(str(out / "exact"), str(out / "exact-found"), exact), tasks=1)
    execute(read, ExactDedupFilter(str(out / "exact-found"), exact), MinhashDedupSignature(str(out / "near"), near))
    pairs = MinhashDedupBuckets(str(out / "near"), str(out / "near-pairs"), config=near, only_dedup_in_index=False)
    execute(pairs, tasks=BANDS)
    execute(MinhashDedupCluster(str(out / "near-pairs"), str(out / "near-found"), config=near), tasks=1)
    execute(
        read,
        ExactDedupFilter(str(out / "exact-found"), exact),
        MinhashDedupFilter(str(out / "near-found")),
        ParquetWriter(str(out / "kept")),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
