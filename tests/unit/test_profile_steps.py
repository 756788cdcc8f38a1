"""Traces of steps: written by the real profiler around real steps, and summarised, on made traces, to known figures."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from profiling.flame import icicle, own_time, read_stacks
from profiling.step_profiler import TraceSteps, profile_steps
from profiling.trace_events import Piece, gaps, kind_of, overlap, read_traces, union
from profiling.trace_report import TraceConfig
from profiling.trace_report import run as summarise_traces
from profiling.trace_summary import by_kind, peak_memory, rank_rows, stragglers, why_idle
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import open_run
from workloads.training.config import TrainingConfig


def train(folder: Path, steps: TraceSteps, count: int = 6, done: int = 0) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    profile_steps(optimizer, steps, folder, rank=0, done=done)
    for _ in range(count - done):
        model(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("first, last, done", [(1, 1, 0), (3, 4, 0), (3, 6, 2), (5, 6, 2)])
def test_just_the_steps_that_were_asked_for_are_traced(tmp_path: Path, first: int, last: int, done: int) -> None:
    train(tmp_path, TraceSteps(first=first, last=last), done=done)
    [trace] = read_traces(tmp_path)
    assert len(trace.steps) == last - first + 1
    assert trace.facts["first"] == first and trace.facts["graph_breaks"] == {}
    assert {"matrix", "optimizer"} & {row["kind"] for row in by_kind(trace)}
    peak, rows = peak_memory(trace, "host")
    assert peak > 0 and rows


def test_steps_that_are_past_leave_no_trace(tmp_path: Path) -> None:
    train(tmp_path, TraceSteps(first=2, last=3), done=4)
    with pytest.raises(UserError, match="train with trace="):
        read_traces(tmp_path)


def test_a_window_that_cannot_be_traced_is_refused() -> None:
    for given, said in (("{first: 3, last: 2}", "first <= last"), ("{first: 1, last: 300}", "at most 50 steps")):
        with pytest.raises(UserError, match=said):
            load(TrainingConfig, None, [f"trace={given}"])
    with pytest.raises(UserError, match="beyond the 20 steps"):
        load(TrainingConfig, None, ["trace={first: 19, last: 21}", "steps=20", "warmup_steps=1"])


MS = 1000.0


def span(name: str, start: float, length: float, cat: str, tid: Any = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start * MS, "dur": length * MS, "cat": cat, "tid": tid, "pid": 1, "args": {}}


def memory(at: float, address: int, size: int, total: int) -> dict[str, Any]:
    told = {"Device Type": 1, "Device Id": 0, "Addr": address, "Bytes": size, "Total Allocated": total}
    return {"ph": "i", "name": "[memory]", "ts": at * MS, "tid": 1, "pid": 1, "cat": "cpu_instant_event", "args": told}


def made(folder: Path, rank: int, matrix: float) -> None:
    """Two steps of 100 ms: a product, a collective from 50 to 90, a kernel beside it from 70 to 80."""
    events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {}}]
    for start in (0, 100):
        events += [
            span(f"ProfilerStep#{start}", start, 100, "user_annotation"),
            span("aten::mm", start, 2, "cpu_op"),
            span("aten::empty", start + 1, 0.5, "cpu_op"),
            span("aten::item", start + 91, 6, "cpu_op"),
            span("aten::_local_scalar_dense", start + 91.5, 5, "cpu_op"),
            span("sm90_xmma_gemm_bf16", start, matrix, "kernel", 7),
            span("ncclDevKernel_AllGather", start + 50, 40, "kernel", 20),
            span("vectorized_elementwise_kernel", start + 70, 10, "kernel", 7),
        ]
    events += [
        memory(0.5, 1, 1 << 20, 5 << 20), memory(1.2, 2, 4 << 20, 9 << 20), memory(50, 2, -(4 << 20), 5 << 20)
    ]  # fmt: skip
    raw = json.dumps({"traceEvents": events}).encode()
    (folder / f"rank-{rank}.json.gz").write_bytes(gzip.compress(raw))


def test_communication_overlap_and_idle_are_those_that_were_made(tmp_path: Path) -> None:
    made(tmp_path, 0, matrix=40)
    [row] = rank_rows(read_traces(tmp_path))
    assert row == {
        "rank": 0, "steps": 2, "step_ms": 100, "compute_ms": 50, "communication_ms": 40,
        "exposed_communication_ms": 30, "overlap_percent": 25, "idle_ms": 20, "idle_percent": 20,
    }  # fmt: skip


def test_time_is_by_kind_and_idle_by_what_the_host_did(tmp_path: Path) -> None:
    made(tmp_path, 0, matrix=40)
    [trace] = read_traces(tmp_path)
    assert [(row["kind"], row["ms_a_step"]) for row in by_kind(trace)] == [
        ("matrix", 40), ("communication", 40), ("elementwise", 10)
    ]  # fmt: skip
    assert [(row["host"].split(":")[0], row["idle_ms_a_step"]) for row in why_idle(trace)] == [
        ("no operator", 14), ("aten", 6)
    ]  # fmt: skip


def test_of_what_reaches_over_the_window_the_part_inside_counts(tmp_path: Path) -> None:
    made(tmp_path, 0, matrix=40)
    [trace] = read_traces(tmp_path)
    trace.work += [Piece("ncclDevKernel_Before", "stream 20", -30 * MS, 40 * MS, 40 * MS)]
    trace.work += [Piece("ncclDevKernel_After", "stream 20", 190 * MS, 40 * MS, 40 * MS)]
    assert {row["kind"]: row["ms_a_step"] for row in by_kind(trace)}["communication"] == pytest.approx(50)
    assert rank_rows([trace])[0]["communication_ms"] == pytest.approx(50)


def test_graph_breaks_are_those_of_the_rank_with_most(tmp_path: Path, runs_root: Path) -> None:
    for rank, breaks in ((0, {"print": 3}), (1, {"print": 1, "item": 2})):
        made(tmp_path, rank, 40)
        (tmp_path / f"rank-{rank}.facts.json").write_text(json.dumps({"rank": rank, "graph_breaks": breaks}))
    config = load(TraceConfig, None, [f"run={tmp_path}"])
    with open_run("profile", "trace", config) as run:
        assert summarise_traces(config, run)["graph_breaks"] == 5


def test_the_peak_has_what_was_alive_and_who_made_it(tmp_path: Path) -> None:
    made(tmp_path, 0, matrix=40)
    [trace] = read_traces(tmp_path)
    peak, rows = peak_memory(trace, "card 0")
    assert peak == 9
    assert [(row["operator"], row["mib"]) for row in rows] == [
        ("aten::mm > aten::empty", 4), ("allocated before the trace", 4), ("aten::mm", 1)
    ]  # fmt: skip


def test_the_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    for rank, matrix in ((0, 30), (1, 48), (2, 31)):
        made(tmp_path, rank, matrix)
    [said] = stragglers(rank_rows(read_traces(tmp_path)))
    assert said.startswith("rank 1 computes 58.0 ms a step, the others 40.5 ms")


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"rank-0\.json\.gz: not a Chrome trace"):
        read_traces(tmp_path)


def packed(events: Any) -> bytes:
    return gzip.compress(json.dumps({"traceEvents": events}).encode())


@pytest.mark.parametrize(
    "content",
    [
        packed([]),
        packed(["x"]),
        packed([{"ph": "X", "ts": 1, "dur": 1}]),
        gzip.compress(b"[]"),
        packed([])[:10] + b"\xff" * 20,
    ],
    ids=["no events", "no object", "no name", "a list", "damaged"],  # gzip's bytes hold the time: no name for a test
)
def test_a_trace_in_which_nothing_ran_or_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank-0.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"rank-0\.json\.gz: not a Chrome trace"):
        read_traces(tmp_path)


def test_facts_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    made(tmp_path, 0, matrix=40)
    (tmp_path / "rank-0.facts.json").write_text('{"ra')
    assert read_traces(tmp_path)[0].facts == {}


def test_intervals() -> None:
    busy = union([(5, 6), (0, 2), (1, 3)])
    assert busy == [(0, 3), (5, 6)]
    assert gaps(busy, (-1, 8)) == [(-1, 0), (3, 5), (6, 8)]
    assert overlap(busy, [(2, 5.5)]) == 1.5
    assert overlap([], busy) == 0


def test_kernels_have_kinds() -> None:
    names = {
        "ncclDevKernel_ReduceScatter_Sum_bf16": "communication", "flash_fwd_kernel": "attention",
        "cutlass_80_tensorop_bf16_s16816gemm": "matrix", "multi_tensor_apply_kernel<AdamFunctor>": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copy", "triton_poi_fused_silu": "compiled",
        "kDequantizeBlockwise": "quantisation",
    }  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_stacks_become_boxes_and_own_time() -> None:
    counts = read_stacks("main (a.py:1);work (a.py:5) 30\nmain (a.py:1);work (a.py:5);inner (b.py:2) 60\nnonsense\n")
    assert own_time(counts).most_common(1) == [("inner (b.py:2)", 60)]
    [figure] = icicle(counts).data
    assert dict(zip(figure.labels, figure.values, strict=True)) == {
        "all": 90, "main (a.py:1)": 90, "work (a.py:5)": 90, "inner (b.py:2)": 60
    }  # fmt: skip
