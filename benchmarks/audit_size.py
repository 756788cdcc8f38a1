"""``python -m benchmarks.audit_size --rows 500000``: the audit of real text in one command, by size.

Audits corpora of a quarter, half and all of the rows with ``workbench data audit`` on a Ray of its own, samples the
memory of the whole process tree, and checks that every planted fault was found and nothing else. Ends with exit code 1
where one was not.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.corpus import build_from_packages
from benchmarks.machine import heading, table, write_down
from benchmarks.planted import Score, score
from benchmarks.process_tree import Peak, run_measured
from workbench.config import CHECKOUT, runs_root
from workbench.files import read_json, write_json

STAGES = ("read_and_measure", "compare", "write")
MOST_MEMORY = 6e9


def corpus_of(rows: int, folder: Path, cache: Path) -> Path:
    """The corpus of so many rows below ``folder``, built if it is not there."""
    corpus = folder / f"corpus-{rows}"
    if not (corpus / "planted.json").exists():
        print(f"building a corpus of {rows:,} documents", flush=True)
        build_from_packages(corpus, rows, cache)
    return corpus


def audit(corpus: Path, folder: Path, *arguments: str) -> tuple[Path, float, Peak]:
    """(the run's folder, seconds, memory) of the audit of a corpus, in its own runs root and with its own Ray."""
    given = []
    for split in ("train", "test"):
        given.append(f"splits.{split}.source={corpus / split}")
        given += [f"splits.{split}.{name}_column={name}" for name in ("id", "title", "source")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"WORKBENCH_RUNS_ROOT": str(folder / "runs"), "WORKBENCH_STATE": str(folder / "state")}
    environment |= {"WANDB_MODE": "disabled", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "workbench", "data", "audit", *given, *arguments]
    began = time.monotonic()
    peak = run_measured(command, environment, folder / f"{corpus.name}.log")
    seconds = time.monotonic() - began
    return max((folder / "runs" / "data-audit").iterdir()), seconds, peak


def stage_seconds(run: Path) -> dict[str, float]:
    """Wall time of the stages of an audit, without the start of Ray."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {stage: last[f"seconds_{stage}"] for stage in STAGES}


def measure(rows: int, corpus: Path, folder: Path) -> tuple[dict[str, Any], list[Score]]:
    """A row of the table, and what was found of what was planted."""
    run, seconds, peak = audit(corpus, folder)
    scores = score(corpus, run / "artifacts")
    stages = stage_seconds(run)
    summary = json.loads((run / "summary.json").read_text())
    row = {
        "documents": f"{rows:,}",
        "command, s": round(seconds),
        **{f"{stage.replace('_', ' ')}, s": round(value) for stage, value in stages.items()},
        "documents/s": round(rows / sum(stages.values())),
        "peak PSS, GB": round(peak.pss / 1e9, 2),
        "peak RSS summed, GB": round(peak.rss / 1e9, 2),
        "exact": summary["exact_duplicates"],
        "near": summary["near_duplicates"],
    }
    print(f"{row}; largest processes: {[(name, round(size / 1e9, 2)) for name, size in peak.largest]}", flush=True)
    return row, scores


def plan(measured: Sequence[Mapping[str, Any]], documents: int = 50_000_000) -> str:
    """What ``documents`` would need by the figures of the smallest and the largest corpus: an estimate in words."""
    small, large = measured[0], measured[-1]
    rows = [int(row["documents"].replace(",", "")) for row in (small, large)]
    cores = psutil.cpu_count() or 1
    spread = large["read and measure, s"] * cores / rows[1] * documents / 3600
    alone = (large["compare, s"] + large["write, s"]) / rows[1] * documents / 3600
    text = f"\nEstimate for {documents:,} documents of this kind, from the largest corpus: reading and measuring\n"
    text += (
        f"{spread:.0f} core hours, which spread over a cluster's cores; comparing and writing {alone:.1f} hours in\n"
    )
    text += "one process, if they go on growing in proportion"
    if rows[1] > rows[0]:
        bytes_each = (large["peak PSS, GB"] - small["peak PSS, GB"]) * 1e9 / (rows[1] - rows[0])
        text += f"; {bytes_each:.0f} bytes of memory a document between the smallest and the largest corpus, so\n"
        text += f"{bytes_each * documents / 1e9:.0f} GB on the driver's machine"
    return text + ".\n"


def main(
    rows: Annotated[int, typer.Option(help="documents of the largest corpus")] = 500_000,
    folder: Annotated[Path | None, typer.Option(help="where corpora and runs stay")] = None,
    corpus: Annotated[Path | None, typer.Option(help="a corpus of these rows that is already built")] = None,
    largest_only: Annotated[bool, typer.Option(help="leave the smaller sizes out")] = False,
    resume: Annotated[bool, typer.Option(help="take the sizes that an earlier call has measured")] = False,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure, print, and check what was found."""
    folder = (folder or runs_root() / "bench-data").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    measured: list[dict[str, Any]] = []
    scores: list[Score] = []
    wrong: list[tuple[int, Score]] = []
    for size in [rows] if largest_only else [rows // 4, rows // 2, rows]:
        built = corpus if corpus and size == rows else corpus_of(size, folder, runs_root() / "cache" / "debian-docs")
        kept = folder / f"result-{size}.json"
        if resume and kept.exists():
            row, scores = read_json(kept)["row"], [Score(**each) for each in read_json(kept)["scores"]]
        else:
            row, scores = measure(size, built, folder)
            write_json(kept, {"row": row, "scores": [asdict(each) for each in scores]})
        measured.append(row)
        wrong += [(size, each) for each in scores if not each.right]
    text = heading("The audit by size", ["ray", "pyarrow", "rensa", "py3langid"])
    text += (
        "\nOne run each, `workbench data audit` on a Ray of its own; memory of the whole process tree, sampled every\n"
    )
    text += "2 s: PSS shares out common pages, RSS counts them once a process.\n\n" + table(measured)
    text += f"\nPlanted into {rows:,} documents and found (beyond: said where there is none; natural: in the text as\n"
    text += "it was):\n\n" + table([each.line() for each in scores])
    write_down(text + plan(measured), append)
    for size, each in wrong:
        print(f"{size:,}: {each.fault}: missed {each.missed[:5]}, beyond {each.beyond[:5]}", file=sys.stderr)
    if float(measured[-1]["peak PSS, GB"]) * 1e9 > MOST_MEMORY:
        sys.exit(f"memory: {measured[-1]['peak PSS, GB']} GB, more than {MOST_MEMORY / 1e9:g}")
    if wrong:
        sys.exit("the audit did not find exactly what was planted")


if __name__ == "__main__":
    typer.run(main)
