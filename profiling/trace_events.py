"""A Chrome trace of torch.profiler as intervals: what ran on the device, what on the host, and memory over time.

Times are in microseconds. On a card the work is its kernels and copies; without one it is the operators of the host,
each less the operators that it called, and the collectives as the process group tells them.
"""

import gzip
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import UserError
from workbench.files import read_record

KINDS = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast",
    "attention": r"flash|fmha|attention|sdpa|efficient_attn",
    "matrix": r"gemm|matmul|cutlass|cublas|\bmm\b|addmm|bmm|linear|gemv|einsum|xmma|wgmma",
    "optimizer": r"adam|multi_tensor|foreach|optimizer|clip_grad",
    "copy": r"memcpy|memset|copy_|_to_copy|\bcat\b|CatArray|contiguous|clone",
    "quantisation": r"dequant|quantize|nf4",
    "normalisation and softmax": r"norm|softmax|logsumexp|nll_loss|cross_entropy",
    "embedding and indexing": r"embedding|index|gather|scatter",
    "compiled": r"triton|inductor|CompiledFunction",
    "elementwise": r"elementwise|aten::|add|mul|silu|gelu|sub|div|pow|rsqrt|reduce|sum|mean|fill|zero",
}
"""Kinds of work by a pattern of the name; the first that fits counts."""

DEVICE_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}
Interval = tuple[float, float]


def kind_of(name: str) -> str:
    """The kind of work that a kernel or operator does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


@dataclass(frozen=True)
class Piece:
    """Something that ran: where (a stream, or a thread), from when, for how long, of which ``own`` was its own."""

    name: str
    lane: str
    start: float
    seconds: float
    own: float

    @property
    def end(self) -> float:
        """When it ended, in microseconds."""
        return self.start + self.seconds


@dataclass
class RankTrace:
    """The trace of one rank: steps, work by device and by host, and bytes allocated over time."""

    rank: int
    on_card: bool
    steps: list[Interval]
    work: list[Piece]
    host: list[Piece]
    memory: dict[str, list[tuple[float, int, int, int]]] = field(default_factory=dict)
    """By device: time, address, bytes (negative: freed), total allocated."""
    facts: dict[str, Any] = field(default_factory=dict)


def read_traces(folder: Path) -> list[RankTrace]:
    """The traces below a folder: ours of a training run, or others of torch.profiler, as vLLM writes them.

    Raises UserError where there are none, or one cannot be read.
    """
    below = folder / "artifacts" / "trace"
    folder = below if below.is_dir() else folder
    files = sorted(folder.glob("rank-*.json.gz")) or sorted(folder.rglob("*.pt.trace.json*"))
    if not files:
        raise UserError(
            f"no traces under {folder}: train with trace='{{first: 3, last: 5}}', and give the run's folder; or a "
            "folder of torch.profiler's *.pt.trace.json"
        )
    return [_read(file, number) for number, file in enumerate(files)]


def _read(file: Path, number: int) -> RankTrace:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return _rank_trace(file, number, json.loads(raw))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a Chrome trace of torch.profiler ({error})") from None


def _rank_trace(file: Path, number: int, told: dict[str, Any]) -> RankTrace:
    """What a file told. Raises ValueError where nothing ran in it; KeyError, TypeError where it is something else."""
    events = told["traceEvents"]
    named = re.fullmatch(r"rank-(\d+)\.json\.gz", file.name)
    rank = int(named[1]) if named else int(told.get("distributedInfo", {}).get("rank", number))
    facts_file = file.with_name(f"rank-{rank}.facts.json")
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = sorted(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in spans
        if e["name"].startswith("ProfilerStep#") and e.get("cat") == "user_annotation"
    )
    if not spans:
        raise ValueError("nothing ran in it")
    if not steps:
        steps = [(min(float(e["ts"]) for e in spans), max(float(e["ts"]) + float(e["dur"]) for e in spans))]
    kernels = [_piece(e, f"stream {e['tid']}") for e in spans if e.get("cat") in DEVICE_EVENTS]
    host = _with_own_time([e for e in spans if e.get("cat") == "cpu_op"])
    told_by_group = [
        _piece(e, "process group")
        for e in spans
        if e.get("cat") == "user_annotation" and e["name"].startswith(("gloo:", "nccl:"))
    ]
    if told_by_group:  # their dispatch is not counted a second time
        host = [piece for piece in host if not piece.name.startswith("c10d::")]
    return RankTrace(
        rank=rank, on_card=bool(kernels), steps=steps, work=kernels or host + told_by_group, host=host,
        memory=_memory(events),
        facts=read_record(facts_file) or {},
    )  # fmt: skip


def _piece(event: dict[str, Any], lane: str) -> Piece:
    duration = float(event["dur"])
    return Piece(event["name"], lane, float(event["ts"]), duration, duration)


def _with_own_time(events: list[dict[str, Any]]) -> list[Piece]:
    """Operators with their time less that of the operators they called, found by nesting within a thread."""
    pieces = []
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        by_thread.setdefault(event["tid"], []).append(event)
    for thread, of in by_thread.items():
        of.sort(key=lambda e: (float(e["ts"]), -float(e["dur"])))
        own = [float(e["dur"]) for e in of]
        open_: list[int] = []
        for index, event in enumerate(of):
            while open_ and float(of[open_[-1]]["ts"]) + float(of[open_[-1]]["dur"]) <= float(event["ts"]):
                open_.pop()
            if open_:
                own[open_[-1]] -= float(event["dur"])
            open_.append(index)
        pieces += [
            Piece(e["name"], f"thread {thread}", float(e["ts"]), float(e["dur"]), max(0.0, own[i]))
            for i, e in enumerate(of)
        ]
    return pieces


def outermost(pieces: list[Piece]) -> list[Piece]:
    """Those that no other piece of their lane called."""
    found, ends = [], dict[str, float]()
    for piece in sorted(pieces, key=lambda piece: (piece.start, -piece.end)):
        if piece.start >= ends.get(piece.lane, float("-inf")):
            ends[piece.lane] = piece.end
            found.append(piece)
    return found


def _memory(events: list[dict[str, Any]]) -> dict[str, list[tuple[float, int, int, int]]]:
    memory: dict[str, list[tuple[float, int, int, int]]] = {}
    for event in events:
        if event.get("name") == "[memory]":
            told = event["args"]
            device = "host" if told.get("Device Type") == 0 else f"card {told.get('Device Id', 0)}"
            row = (float(event["ts"]), int(told["Addr"]), int(told["Bytes"]), int(told["Total Allocated"]))
            memory.setdefault(device, []).append(row)
    return {device: sorted(rows, key=lambda row: row[0]) for device, rows in memory.items()}


def union(intervals: list[Interval]) -> list[Interval]:
    """The same stretches of time without overlap, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: list[Interval]) -> float:
    """The sum of the lengths."""
    return float(sum(end - start for start, end in intervals))


def overlap(one: list[Interval], other: list[Interval]) -> float:
    """The time that is in both; each of them a ``union``."""
    edges = np.array(sorted({edge for interval in (*one, *other) for edge in interval}))
    if len(edges) < 2:
        return 0.0
    middles = (edges[1:] + edges[:-1]) / 2
    both = _covers(one, middles) & _covers(other, middles)
    return float(np.sum(np.diff(edges)[both]))


def _covers(intervals: list[Interval], times: np.ndarray) -> np.ndarray:
    if not intervals:
        return np.zeros(len(times), bool)
    starts, ends = np.array(intervals).T
    at = np.searchsorted(starts, times, side="right") - 1
    return (at >= 0) & (times < ends[at])


def gaps(busy: list[Interval], within: Interval) -> list[Interval]:
    """What of ``within`` no interval of ``busy``, a ``union``, covers."""
    found, at = [], within[0]
    for start, end in busy:
        if start > at:
            found.append((at, min(start, within[1])))
        at = max(at, end)
    if at < within[1]:
        found.append((at, within[1]))
    return [(start, end) for start, end in found if end > start]
