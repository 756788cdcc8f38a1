"""Memory of the loss step, chunked against plain, by the size of the vocabulary.

    python -m benchmarks.loss_memory --append docs/benchmarks.md

The loss step is what comes after the decoder: hidden states to logits to cross-entropy, and back to the gradient of the
hidden states and, where the head is trained, of its weight. The peak of live tensor bytes is counted on tensors that
have shapes and no storage, so it is exact, it is the same on every machine, and sizes that do not fit can be counted.
Hidden states and the head's weight are there before the step and are not counted. With ``--time`` the step runs on the
first CUDA card, and its seconds and the allocator's peak are measured as well.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import heading, table, write_down
from workloads.training.chunked_loss import chunked_loss, cross_entropy
from workloads.training.config import LOSS_CHUNK
from workloads.training.tensor_bytes import TensorBytes

HIDDEN, TOKENS = 2048, 4096
VOCABULARIES = (32_768, 131_072, 262_144)


def step(hidden_NH: Tensor, labels_N: Tensor, head: nn.Linear, chunk: int) -> None:
    """One loss and its gradients; ``chunk`` 0 makes all logits."""
    if chunk:
        weights = [weight for weight in head.parameters() if weight.requires_grad]
        chunked_loss(hidden_NH, labels_N, head, weights, cross_entropy, chunk).objective.backward()
    else:
        cross_entropy(head(hidden_NH).float(), labels_N).backward()


def inputs(vocabulary: int, dtype: torch.dtype, trained: bool, device: str) -> tuple[Tensor, Tensor, nn.Linear]:
    """Hidden states, labels and head."""
    head = nn.Linear(HIDDEN, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(trained)
    hidden_NH = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    return hidden_NH, torch.zeros(TOKENS, dtype=torch.long, device=device), head


def counted(vocabulary: int, dtype: torch.dtype, trained: bool, chunk: int) -> int:
    """Bytes at the peak of a step."""
    given = inputs(vocabulary, dtype, trained, "meta")
    with TensorBytes() as live:
        step(*given, chunk)
    return live.peak


def measured(vocabulary: int, dtype: torch.dtype, trained: bool, chunk: int) -> tuple[float, int]:
    """Median seconds of five steps on a card, and the bytes that its allocator had handed out at the peak."""
    given = inputs(vocabulary, dtype, trained, "cuda")
    seconds = []
    for _ in range(6):
        given[0].grad = given[2].weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step(*given, chunk)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:]), torch.cuda.max_memory_allocated() - before


def rows(timed: bool) -> list[dict[str, Any]]:
    """One a vocabulary, type and head."""
    found = []
    for trained in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for vocabulary in VOCABULARIES:
                case = (vocabulary, dtype, trained)
                plain, chunked = counted(*case, 0), counted(*case, LOSS_CHUNK)
                row = {
                    "head": "trained" if trained else "frozen",
                    "type": str(dtype).removeprefix("torch."),
                    "vocabulary": f"{vocabulary:,}",
                    "plain, GB": f"{plain / 1e9:.2f}",
                    "chunked, GB": f"{chunked / 1e9:.2f}",
                    "less by": f"{1 - chunked / plain:.0%}",
                }
                if timed:
                    for name, chunk in (("plain", 0), ("chunked", LOSS_CHUNK)):
                        seconds, peak = measured(*case, chunk)
                        row |= {f"{name}, ms": f"{seconds * 1e3:.1f}", f"{name}, allocator, GB": f"{peak / 1e9:.2f}"}
                found.append(row)
    return found


def main() -> None:
    """Count, print, and append to a page where asked."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--time", action="store_true", help="measure on the first CUDA card too")
    arguments.add_argument("--append", type=Path, help="a Markdown page")
    given = arguments.parse_args()
    card = f" Timed on {torch.cuda.get_device_name(0)}." if given.time else ""
    text = heading("The loss step in chunks", ["torch"]) + (
        f"\nHidden size {HIDDEN:,}, {TOKENS:,} target tokens, chunks of {LOSS_CHUNK}. Bytes are counted on tensors "
        f"without storage and do not depend on the machine.{card}\n\n"
    )
    write_down(text + table(rows(given.time)), given.append)


if __name__ == "__main__":
    main()
