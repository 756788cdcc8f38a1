"""Copies between memories, timed and checked: what runs on a host for ``workbench profile pcie``.

Everything is torch's own ``copy_``: cudaMemcpyAsync between host and card, and between cards where they have
peer-to-peer access. Without that access the way leads through host memory, which is measured as the copy to pinned
memory and on.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profiling.nvidia import card_width

HOST = torch.device("cpu")
LEAST_SECONDS = 0.005
"""A round lasts about so long at least, or is one copy."""


@dataclass(frozen=True)
class Way:
    """A way of bytes: a name, where they come from and go to, how, and how many directions run at once."""

    name: str
    source: torch.device
    target: torch.device
    pinned: bool = False
    both: bool = False
    staged: bool = False
    threads: int = 0


def ways() -> Iterator[Way]:
    """Every way on this host: to and from each card, within it, between each pair; without cards, within memory."""
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for card in cards:
        for pinned in (True, False):
            kind = "pinned" if pinned else "pageable"
            yield Way(f"host to card {card.index}, {kind}", HOST, card, pinned)
            yield Way(f"card {card.index} to host, {kind}", card, HOST, pinned)
        yield Way(f"host and card {card.index}, both at once", HOST, card, pinned=True, both=True)
        yield Way(f"within card {card.index}", card, card)
    for source in cards:
        for target in cards:
            if source != target:
                pair = f"card {source.index} to card {target.index}"
                if torch.cuda.can_device_access_peer(target.index, source.index):
                    yield Way(f"{pair}, peer to peer", source, target)
                yield Way(f"{pair}, through the host", source, target, staged=True)
    if not cards and torch.backends.mps.is_available():
        gpu = torch.device("mps")
        yield Way("host to GPU", HOST, gpu)
        yield Way("GPU to host", gpu, HOST)
        yield Way("within the GPU", gpu, gpu)
    if not cards:
        for threads in sorted({1, os.cpu_count() or 1}):
            yield Way(f"within memory, {threads} thread{'s' if threads > 1 else ''}", HOST, HOST, threads=threads)


def measure_host(sizes: list[int], rounds: int) -> dict[str, Any]:
    """All ways of this host at all sizes; a Ray task. A size that does not fit is left out and named."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    links: dict[str, Any] = {}
    for way in ways():
        for size in sizes:
            try:
                rows.append({"way": way.name, "bytes": size, **measure(way, size, rounds)})
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if "memory" not in str(error).lower():
                    raise
                left_out.append(f"{way.name}, {size:,} bytes: out of memory")
                break
        if way.source.type != way.target.type and "cuda" in (way.source.type, way.target.type):
            card = way.target if way.target.type == "cuda" else way.source
            links[str(card.index)] = link_of(card)  # now, under load: a card that idles slows its link down
    names = {str(index): torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return {"host": socket.gethostname(), "rows": rows, "links": links, "cards": names, "left_out": left_out}


def measure(way: Way, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of a copy of ``size`` bytes in each of ``rounds``, and the bytes that arrived wrong."""
    threads = torch.get_num_threads()
    if way.threads:
        torch.set_num_threads(way.threads)
    try:
        pairs = [_buffers(way, size)]
        if way.both:
            back = Way("", way.target, way.source, way.pinned)
            pairs.append(_buffers(back, size))
        run = _runner(way, pairs)
        run(1)
        repeats = max(1, int(LEAST_SECONDS / max(run(1), 1e-7)))
        seconds = [run(repeats) / repeats for _ in range(rounds)]
        for _, target, _ in pairs:
            target.zero_()
        run(1)  # what is checked is a copy of its own, and none that came before
        wrong = sum(int((target.to(HOST) != source.to(HOST)).sum()) for source, target, _ in pairs)
    finally:
        torch.set_num_threads(threads)
    return {"seconds": seconds, "moved": size * len(pairs), "wrong": wrong}


def _buffers(way: Way, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Source with made bytes, target without, and the host's buffer between them where there is one."""
    made = torch.from_numpy(np.random.default_rng(size).integers(1, 256, size, dtype=np.uint8))
    pin = way.pinned and way.source.type != way.target.type
    source = made.pin_memory() if pin and way.source == HOST else made.to(way.source)
    target = torch.zeros(size, dtype=torch.uint8, device=way.target, pin_memory=pin and way.target == HOST)
    between = torch.zeros(size, dtype=torch.uint8, pin_memory=True) if way.staged else None
    return source, target, between


def _runner(way: Way, pairs: list[tuple[Tensor, Tensor, Tensor | None]]) -> Callable[[int], float]:
    """What copies so many times and returns the seconds until all of it has arrived."""
    card = way.target if way.target.type == "cuda" else way.source
    # a stream of another card would not be the one that the copies go to
    streams = [torch.cuda.Stream(card) for _ in pairs] if way.both else [None] * len(pairs)

    def copy(source: Tensor, target: Tensor, between: Tensor | None) -> None:
        if between is None:
            target.copy_(source, non_blocking=way.pinned)
        else:
            between.copy_(source)
            target.copy_(between)

    def run(times: int) -> float:
        _synchronize(way)
        begun = time.perf_counter()
        for _ in range(times):
            for pair, stream in zip(pairs, streams, strict=True):
                with torch.cuda.stream(stream):
                    copy(*pair)
        _synchronize(way)
        return time.perf_counter() - begun

    return run


def _synchronize(way: Way) -> None:
    for device in {way.source, way.target}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def link_of(card: torch.device) -> dict[str, Any]:
    """Generation and width of a card's PCIe link at the moment, and at best; found in NVML by the card's UUID."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(card).uuid}")
        return {
            "generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            "generation_max": pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            "width_max": card_width(pynvml, handle),
        }
    except pynvml.NVMLError as error:
        return {"missing": str(error)}
