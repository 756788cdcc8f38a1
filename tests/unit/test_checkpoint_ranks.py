"""A rank is killed while a checkpoint is being written; any number of ranks goes on from the one before.

Two processes without Ray; ``tests/integration/test_train_kill.py`` kills Ray Train's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from loss_equality import SHARED, make_base, make_rows

EVERY = 5


def train_rank(rank: int, world: int, folder: Path, base: Path, kill: bool) -> None:
    """QLoRA as ``rank`` of ``world`` in the run ``folder``; with ``kill`` rank 0 dies with all shards of a checkpoint
    written and the checkpoint not yet named."""
    import torch.distributed as dist

    from workbench.config import load
    from workloads.fine_tune import export_adapter, fine_tune
    from workloads.sft import SftConfig
    from workloads.training.ray_train import WorkerEvents

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{kill}", rank=rank, world_size=world)
    keys = [f"base={json.dumps(str(base))}", *SHARED, f"checkpoint_every={EVERY}", "log_every=2"]
    config = load(SftConfig, None, keys)

    def export(model: Any) -> Any:
        write = export_adapter(model)

        def write_or_die(target: Path) -> None:
            if kill and target.parent.name.startswith(".step-00000010"):
                os.kill(os.getpid(), signal.SIGKILL)
            write(target)

        return write_or_die

    rows = make_rows(base, 60)
    with WorkerEvents(folder, rank, config, export) as events:
        done = fine_tune(
            config,
            rows[:50],
            rows[50:],
            device=torch.device("cpu"),
            events=events,
            result=folder / "adapter",
            rank=rank,
        )
    if rank == 0:
        summary = {"train": done.history.train, "resumed_from": done.resumed_from}
        (folder / "done.json").write_text(json.dumps(summary))


def start(world: int, folder: Path, base: Path, kill: bool = False) -> None:
    import torch.multiprocessing as processes

    folder.mkdir(exist_ok=True)
    try:
        processes.start_processes(train_rank, (world, folder, base, kill), world, start_method="fork")
    except processes.ProcessExitedException:
        assert kill


def main(folder: Path) -> None:
    """An undisturbed run, a killed one, and what one, two and four ranks make of that."""
    import bitsandbytes  # noqa: F401  # once, before the forks
    import peft  # noqa: F401
    import torch.multiprocessing as processes

    import workloads.fine_tune  # noqa: F401

    processes.start_processes(_base_in, (folder,), 1, start_method="fork")
    start(2, folder / "whole", folder / "base")
    start(2, folder / "cut", folder / "base", kill=True)
    for world in (1, 2, 4):
        shutil.copytree(folder / "cut", folder / f"by-{world}", ignore=shutil.ignore_patterns("meet-*"))
        start(world, folder / f"by-{world}", folder / "base")


def _base_in(_: int, folder: Path) -> None:
    make_base(folder / "base")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder


def test_the_checkpoint_before_stays_and_the_half_of_the_other_has_no_name(runs: Path) -> None:
    assert [path.name for path in sorted((runs / "cut" / "checkpoints").iterdir())] == [
        ".step-00000010.partial", "step-00000005",
    ]  # fmt: skip
    assert not list((runs / "by-2" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("world", "tolerance"), [(2, 0.0), (1, 1e-5), (4, 1e-5)])
def test_any_number_of_ranks_goes_on_as_if_nothing_had_happened(runs: Path, world: int, tolerance: float) -> None:
    whole, resumed = (json.loads((runs / name / "done.json").read_text()) for name in ("whole", f"by-{world}"))
    assert resumed["resumed_from"] == 5
    assert [step for step, _ in resumed["train"]] == [step for step, _ in whole["train"]]
    assert [loss for _, loss in resumed["train"]] == pytest.approx([loss for _, loss in whole["train"]], abs=tolerance)
    mine, its = (load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in (f"by-{world}", "whole"))
    for name, weight in its.items():
        assert torch.allclose(mine[name], weight, rtol=0, atol=tolerance), name


def test_metrics_have_every_step_once(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "by-2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, *range(6, 21, 2)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
