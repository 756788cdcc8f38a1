"""``python -m benchmarks.audit_peers --corpus FOLDER --rows 50000``: the audit beside datatrove and Data-Juicer.

The same Parquet files, the same cores, in turn in one sitting: whole commands, from the shell's start to their end.
Each peer runs in an environment of its own, made on the first call. What they do differs and is told with the figures:
ours also tells the language and mojibake, knows eight kinds of personal data with checksums, and compares candidates of
near duplicates by their true similarity.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
import yaml

from benchmarks.machine import heading, table, write_down
from workbench.config import CHECKOUT, runs_root
from workbench.errors import Failure
from workbench.files import read_json, write_json

CORES = 2
ENVIRONMENTS = {
    "datatrove": ["datatrove[io,processing]==0.10.1", "spacy==3.8.18"],
    "data-juicer": ["py-data-juicer==1.6.1", "scipy==1.17.1", "aiohttp==3.14.5"],
}
JUICER_FILTERS = (
    "alphanumeric_filter", "average_line_length_filter", "character_repetition_filter", "maximum_line_length_filter",
    "special_characters_filter", "text_length_filter", "word_repetition_filter", "words_num_filter",
)  # fmt: skip
"""Those of its filters that need no model or word list from the network."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DJ_PRODUCED_DATA_LINEAGE": "0", "WANDB_MODE": "disabled"}


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there. Raises Failure where it cannot be."""
    python = folder / name / "bin" / "python"
    if not (folder / name / "installed").exists():
        print(f"installing {name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"{name} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (folder / name / "installed").touch()
    return python


def take(corpus: Path, rows: int, folder: Path) -> int:
    """Copy whole Parquet files of ``corpus`` until there are so many rows; how many there are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = 0
    for file in sorted((corpus / "train").glob("part-*.parquet")):
        if found < rows:
            shutil.copy(file, folder)
            found += pq.read_metadata(file).num_rows
    return found


def ours(python: Path, source: Path, out: Path) -> None:
    """``workbench data audit`` with a Ray of its own."""
    given = [f"source={source}", *(f"{name}_column={name}" for name in ("id", "title", "source"))]
    own = {"WORKBENCH_RUNS_ROOT": str(out), "WORKBENCH_STATE": str(out / "state"), "PYTHONPATH": str(CHECKOUT)}
    execute([str(python), "-m", "workbench", "data", "audit", *given], out, own)


def datatrove(python: Path, source: Path, out: Path) -> None:
    """Its statistics, rules and both kinds of duplicates."""
    execute([str(python), str(Path(__file__).with_name("peer_datatrove.py")), str(source), str(out), str(CORES)], out)


def data_juicer(python: Path, source: Path, out: Path) -> None:
    """Its statistics, its PII rules and both kinds of duplicates, on its default executor."""
    filters: list[dict[str, dict[str, Any]]] = []
    for name in JUICER_FILTERS:  # within limits that nothing crosses
        what = "len" if "length" in name else "num" if "num_" in name else "ratio"
        filters.append({name: {f"min_{what}": 0, f"max_{what}": 1.0 if what == "ratio" else 10**9}})
    near = {"tokenization": "space", "window_size": 3, "lowercase": True, "num_permutations": 120}
    near |= {"jaccard_threshold": 0.8, "num_bands": 24, "num_rows_per_band": 5}
    exact = {"lowercase": True, "ignore_non_character": False}
    process = [*filters, {"pii_redaction_mapper": {}}]
    process += [{"document_deduplicator": exact}, {"document_minhash_deduplicator": near}]
    recipe = {
        "project_name": "peers",
        "dataset_path": str(source),
        "export_path": str(out / "kept.jsonl"),
        "np": CORES,
        "use_cache": False,
        "open_tracer": False,
        "process": process,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    own = {"DATA_JUICER_CACHE_HOME": str(out / "cache"), "HF_HOME": str(out / "hf")}
    execute([str(python.with_name("dj-process")), "--config", str(out / "recipe.yaml")], out, own)


def execute(command: list[str], out: Path, own: Mapping[str, str] | None = None) -> None:
    """Run, with the output beside ``out``. Raises Failure with the end of it."""
    out.mkdir(parents=True, exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | OFFLINE
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        code = subprocess.run(
            command, env=variables | dict(own or {}), stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise Failure(f"{Path(command[0]).name} ended with {code}: {log.read_text()[-600:]}")


def removed_by_ours(out: Path) -> int:
    """How many documents the audit would remove."""
    summary = read_json(max((out / "data-audit").glob("2*/summary.json")))
    return int(summary["documents"] - summary["kept"])


def removed_by_datatrove(out: Path, rows: int) -> int:
    """How many documents datatrove removed."""
    return rows - sum(pq.read_metadata(file).num_rows for file in (out / "kept").glob("*.parquet"))


def removed_by_juicer(out: Path, rows: int) -> int:
    """How many documents Data-Juicer removed."""
    with (out / "kept.jsonl").open("rb") as lines:
        return rows - sum(1 for _ in lines)


def main(
    corpus: Annotated[Path, typer.Option(help="a folder that benchmarks.corpus wrote")],
    rows: Annotated[int, typer.Option(help="how many documents of it, rounded up to whole files")] = 50_000,
    repeats: Annotated[int, typer.Option(help="rounds, each side once in each")] = 3,
    folder: Annotated[Path | None, typer.Option(help="where environments and outputs stay")] = None,
    resume: Annotated[bool, typer.Option(help="count the rounds of earlier calls, too")] = False,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure in turn, and print documents per second with the ratio of ours."""
    folder = (folder or runs_root() / "bench-peers").absolute()
    source = folder / "input"
    rows = take(corpus, rows, source)
    sides: dict[str, tuple[Callable[[Path, Path, Path], None], Path]] = {"workbench": (ours, Path(sys.executable))}
    lacking = []
    for name, peer in {"datatrove": datatrove, "data-juicer": data_juicer}.items():
        try:
            sides[name] = (peer, environment(name, folder / "environments"))
        except Failure as failure:
            lacking.append(str(failure))
    kept = folder / "seconds.json"
    earlier = read_json(kept) if resume and kept.exists() else {}
    seconds: dict[str, list[float]] = {name: earlier.get(name, []) for name in sides}
    for turn in range(repeats):
        for name, (audit, interpreter) in list(sides.items()):
            out = folder / "out" / name
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            try:
                audit(interpreter, source, out)
            except Failure as failure:
                lacking.append(str(failure))
                del sides[name], seconds[name]
                continue
            seconds[name].append(time.monotonic() - began)
            write_json(kept, seconds)
            print(f"round {turn + 1}: {name} {seconds[name][-1]:.1f} s", flush=True)
    counted = {"workbench": removed_by_ours, "datatrove": removed_by_datatrove, "data-juicer": removed_by_juicer}
    lines: list[dict[str, Any]] = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        given: list[Any] = [folder / "out" / name] if name == "workbench" else [folder / "out" / name, rows]
        lines.append(
            {
                "": " ".join([name, *(part.partition("==")[2] for part in ENVIRONMENTS.get(name, [])[:1])]),
                "seconds, median": round(middle, 1),
                "spread": f"{min(times):.1f} to {max(times):.1f}",
                "documents/s": round(rows / middle),
                "ours is faster by": f"{middle / statistics.median(seconds['workbench']):.2f}",
                "removed": counted[name](*given),  # type: ignore[operator]
            }
        )
    text = heading("The audit beside datatrove and Data-Juicer", ["ray", "pyarrow", "rensa"])
    rounds = len(seconds["workbench"])
    text += f"\n{rows:,} documents, {CORES} processes each, whole commands in turn, {rounds} rounds.\n\n{table(lines)}"
    text += "".join(f"\nNot measured: {why}\n" for why in lacking)
    write_down(text, append)


if __name__ == "__main__":
    typer.run(main)
