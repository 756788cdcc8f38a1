"""Copies, collectives, traces and the roof on real cards."""

from pathlib import Path

import pytest

from profiling.nvbandwidth import run_nvbandwidth
from profiling.shares import link_bytes
from profiling.trace_events import read_traces
from profiling.trace_summary import by_kind, peak_memory, rank_rows

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _card() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA card, or a PyTorch without CUDA")


def test_every_way_is_measured_and_arrives_and_none_beats_its_link() -> None:
    from profiling.copies import measure_host

    host = measure_host([1024, 256 * MIB], rounds=3)
    assert sum(row["wrong"] for row in host["rows"]) == 0
    best = {row["way"]: row["bytes"] / min(row["seconds"]) for row in host["rows"] if row["bytes"] > MIB}
    for card, link in host["links"].items():
        if "width" in link:
            limit = link_bytes(link["generation"], link["width"])
            assert 0.3 * limit < best[f"host to card {card}, pinned"] < 1.02 * limit
            assert 0.3 * limit < best[f"card {card} to host, pinned"] < 1.02 * limit
        assert best[f"within card {card}"] > best[f"host to card {card}, pinned"]


def test_nvbandwidth_agrees_within_a_few_percent() -> None:
    from profiling.copies import measure_host

    theirs = run_nvbandwidth()
    if "missing" in theirs:
        pytest.skip(theirs["missing"])
    ours = {row["way"]: row["bytes"] / min(row["seconds"]) / 1e9 for row in measure_host([512 * MIB], 7)["rows"]}
    for way in ("host to card 0, pinned", "card 0 to host, pinned"):
        assert ours[way] == pytest.approx(theirs[way], rel=0.05)


def test_collectives_over_nccl_are_right(runs_root: Path) -> None:
    import torch

    from profiling import collectives
    from workbench.runs import open_run
    from workbench.session import connect

    if torch.cuda.device_count() < 2:
        pytest.skip("one card only")
    config = collectives.CollectivesConfig(gpus_per_worker=1, workers=torch.cuda.device_count(), cpus_per_worker=1)
    with connect(), open_run("profile", "collectives", config) as run:
        summary = collectives.run(config, run)
    assert summary["wrong"] == 0 and summary["backend"].startswith("nccl")


def test_a_traced_step_has_kernels_idle_and_memory(tmp_path: Path) -> None:
    import torch

    from profiling.step_profiler import TraceSteps, profile_steps

    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 2048)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    profile_steps(optimizer, TraceSteps(first=3, last=4), tmp_path, rank=0, done=0)
    for _ in range(5):
        model(torch.randn(4096, 2048, device="cuda")).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    [trace] = read_traces(tmp_path)
    assert trace.on_card and len(trace.steps) == 2
    assert by_kind(trace)[0]["kind"] == "matrix"
    [row] = rank_rows([trace])
    assert 0 < row["compute_ms"] <= row["step_ms"] * 1.5
    peak, rows = peak_memory(trace, "card 0")
    assert peak > 32 and rows
    assert (tmp_path / "rank-0.memory.pickle").stat().st_size > 0


def test_the_roof_is_near_the_data_sheet(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from profiling.roofline import RooflineConfig, measure_device

    LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16).save_pretrained(
        tmp_path
    )
    measured = measure_device(RooflineConfig(model=tmp_path, decode=[1, 8], rounds=3).model_dump(mode="json"))
    assert measured["operations_per_second"] > 1e13 and measured["bytes_per_second"] > 1e11
    assert measured["seconds"].keys() == {"prefill", "decode x1", "decode x8", "training step"}
