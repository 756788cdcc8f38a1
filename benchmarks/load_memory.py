"""Memory of each rank while a base is loaded and sharded: whole on every rank, or piece by piece.

    python -m benchmarks.load_memory --ranks 2 --append docs/benchmarks.md

A random Llama is written once. Then each way and quantisation has as many gloo processes as there are ranks, which do
what a worker of ``train sft`` does up to its first step. Measured is what a process holds beyond what it held before:
its own memory (RssAnon, looked at every 5 ms), which no other can use, at the most and when all is sharded.
"""

import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import typer

from benchmarks.machine import heading, table, write_down
from workbench.files import read_json, write_json
from workloads.training.adapters import add_adapter, load_base
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import shard
from workloads.training.pieces import Pieces

CPU = torch.device("cpu")


def own_bytes() -> int:
    """What this process holds and no file does."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Highest:
    """The most of ``own_bytes`` inside the block."""

    def __enter__(self) -> "Highest":
        self.peak, self._done = own_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load(rank: int, world: int, way: str, quantization: Any, base: str, folder: str) -> None:
    """Load and shard as ``rank``, and write what it took."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.nn.Linear(8, 8)(torch.zeros(1, 8))
    before, begun = own_bytes(), time.perf_counter()
    with Highest() as highest:
        pieces = Pieces.of(base, "float32", quantization, CPU, "bitsandbytes") if way == "in pieces" else None
        model = load_base(base, "float32", quantization, CPU) if pieces is None else pieces.model
        model = add_adapter(model, AdapterConfig())
        shard(model, torch.float32, fill=pieces.fill if pieces else None)
    found = {
        "peak": highest.peak - before, "after": own_bytes() - before, "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    write_json(Path(folder) / f"rank-{rank}.json", found)
    dist.barrier()
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(help="processes that share the model")] = 2,
    hidden: Annotated[int, typer.Option(help="width of the model; and so on")] = 1024,
    intermediate: int = 4096,
    layers: int = 12,
    vocabulary: int = 32_000,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure each way, and print a table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    with tempfile.TemporaryDirectory(prefix="load-memory-") as folder:
        base = f"{folder}/base"
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(base)
        del model
        for quantization in ("none", "nf4"):
            for way in ("whole", "in pieces"):
                meet = tempfile.mkdtemp(dir=folder)
                processes.spawn(load, (ranks, way, quantization, base, meet), nprocs=ranks)
                found = [read_json(Path(meet) / f"rank-{rank}.json") for rank in range(ranks)]
                row = {"base": "float32" if quantization == "none" else "NF4", "loaded": way}
                row |= {
                    f"{what}, MB a rank": f"{max(each[key] for each in found) / 1e6:,.0f}"
                    for key, what in (("peak", "at the most"), ("after", "when sharded"))
                }
                rows.append(row | {"seconds": f"{max(each['seconds'] for each in found):.1f}"})
    text = heading("Loading a base by rank", ["torch", "transformers", "bitsandbytes"]) + (
        f"\n`python -m benchmarks.load_memory`: a Llama of {size / 1e6:.0f} million weights, {size * 4 / 1e6:,.0f} MB "
        f"in float32, {layers} layers, with a LoRA adapter of rank 16, over {ranks} gloo processes of one thread; the "
        "process's own memory beyond what it held before.\n\n"
    )
    write_down(text + table(rows), append)


if __name__ == "__main__":
    typer.run(main)
