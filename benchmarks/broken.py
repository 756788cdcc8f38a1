"""Rows that cannot be read, in files beside the good ones, each with the reason that an audit must give for it."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.planting import new_word
from data_pipelines.corpus import SAME_ID, SAME_ROW

TOO_LONG = 120_000
"""Characters; the audit's default limit is 100,000."""


def write(folder: Path, each: int, rng: random.Random) -> list[dict[str, Any]]:
    """Write ``broken.jsonl``, ``broken.parquet`` and two files that are cut off into ``folder``, ``each`` rows of every
    kind; (source, reason) of all of them. Of rows with one id one is good: there are twice ``each`` good rows."""
    expected = _lines(folder / "broken.jsonl", each, rng)
    expected += _undecodable_cells(folder / "broken.parquet", each, rng)
    rows = pa.table({name: [_text(rng) for _ in range(100)] for name in ("id", "title", "source", "text")})
    pq.write_table(rows, folder / "cut.parquet")
    whole = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 10_000)[:20])
    return [
        *expected,
        {"source": "cut.parquet", "reason": "unreadable file (ArrowInvalid)"},
        {"source": "cut.jsonl.gz", "reason": "unreadable file (OSError)"},
    ]


def _text(rng: random.Random) -> str:
    return " ".join(new_word(rng) for _ in range(80))


def _lines(path: Path, each: int, rng: random.Random) -> list[dict[str, Any]]:
    lines: list[bytes] = []
    expected: list[dict[str, Any]] = []

    def record(reason: str, **given: Any) -> None:
        source = f"{path.name}/{len(lines)}"
        lines.append(json.dumps({"id": source, "title": "", "source": source, "text": _text(rng)} | given).encode())
        if reason:
            expected.append({"source": given.get("source", source), "reason": reason})

    def line(reason: str, content: bytes) -> None:
        lines.append(content)
        expected.append({"source": f"{path.name}:{len(lines)}", "reason": reason})

    for at in range(each):
        record("text is missing", text=None)
        record("text is no text but int", text=at)
        record("text is no text but list", text=["words", "of", "a", "list"])
        record("empty", text="")
        record("empty", text=" \n\t ")
        record("no words", text="... --- ...")
        record("too long", text=f"{new_word(rng)} " * (TOO_LONG // 8))
        record("id is missing", id=None)
        line("undecodable line", f'{{"id": "latin-{at}", "text": "caf'.encode() + b'\xe9 and more"}')
        line("not a JSON object", f'{{"id": "cut-{at}", "text": "{_text(rng)}'.encode())
        line("not a JSON object", f'["{_text(rng)}"]'.encode())
        again = {"id": f"again-{at}", "source": f"again {at}", "text": _text(rng)}
        record("", **again)
        record(SAME_ROW, **again)
        record("", id=f"twice-{at}", source=f"twice {at}")
        record(SAME_ID, id=f"twice-{at}", source=f"twice {at}")
    path.write_bytes(b"\n".join(lines) + b"\n")
    return expected


def _undecodable_cells(path: Path, each: int, rng: random.Random) -> list[dict[str, Any]]:
    """A Parquet file whose texts are not UTF-8."""
    texts = pa.array([b"caf\xe9 " + _text(rng).encode() for _ in range(each)], pa.binary())
    names = pa.array([f"cell-{at}" for at in range(each)])
    columns = {"id": names, "title": names, "source": names, "text": texts.view(pa.string())}
    pq.write_table(pa.table(columns), path)
    return [{"source": f"{path.name}:{at + 1}", "reason": "undecodable row"} for at in range(each)]
