"""Our Triton kernel for NF4 beside bitsandbytes', on the card that is there.

    python -m benchmarks.nf4_kernel --rounds 7

Both undo the same packed weights, both levels of scales, into fp16 and bf16, in turn, for the shapes of the usual
projections and MLPs. Each is timed twice: called from Python, as eager training calls it, and replayed from a CUDA
graph, which leaves the time of the kernels alone. A figure is the median over rounds, the spread the lowest and highest
round. Exits with 2 where there is no CUDA card.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

SHAPES = [(1024, 4096), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096)]

Call = Callable[[], object]


def main() -> int:
    """Print a row for each shape, dtype and way of timing: microseconds of both, and how many times as fast ours is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="each has both sides in turn")
    rounds: int = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("no CUDA card here: the kernel's speed can be measured on one only", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rounds} rounds\n")
    print("| shape | dtype | timed | ours, us | bitsandbytes, us | lowest to highest, ours | theirs | times as fast |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios: dict[str, list[float]] = {"called": [], "graph": []}
    for shape in SHAPES:
        for dtype in (torch.float16, torch.bfloat16):
            calls = both(shape, dtype)
            for way in ratios:
                ours, theirs = in_turn(calls, rounds, called if way == "called" else replayed)
                ratios[way].append(statistics.median(theirs) / statistics.median(ours))
                print(
                    f"| {shape[0]}x{shape[1]} | {str(dtype).removeprefix('torch.')} | {way} "
                    f"| {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} "
                    f"| {min(ours):.1f} to {max(ours):.1f} | {min(theirs):.1f} to {max(theirs):.1f} "
                    f"| {ratios[way][-1]:.2f} |"
                )
    print()
    for way, found in ratios.items():
        print(f"{way}: geometric mean {statistics.geometric_mean(found):.2f}, lowest {min(found):.2f}; the aim is 1.15")
    return 0


def both(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Call, Call]:
    """Ours and bitsandbytes' undoing of one random weight. Raises AssertionError if they differ by a bit."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from workloads.training.nf4 import NF4Stack

    weight = torch.randn(shape, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    stack, flat = NF4Stack(state, "triton"), packed.view(-1)
    assert torch.equal(stack(flat), dequantize_4bit(packed, state)), "the kernels differ"
    return lambda: stack(flat), lambda: dequantize_4bit(packed, state)


def in_turn(calls: tuple[Call, Call], rounds: int, timed: Callable[[Call], float]) -> tuple[list[float], list[float]]:
    """Microseconds of each of the two, once a round."""
    pairs = [(timed(calls[0]), timed(calls[1])) for _ in range(rounds)]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def called(call: Call) -> float:
    """Mean microseconds of 50 calls from Python, after three to warm up."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1000 / 50


def replayed(call: Call) -> float:
    """Median microseconds of a call in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, return_mode="median")) * 1000


if __name__ == "__main__":
    raise SystemExit(main())
