"""Out of memory, in every form that a card, a host and Ray give it."""

import errno
from pathlib import Path

from torch import cuda

KERNEL = "kernel has killed a process"
"""What is said where only the kernel's count tells of a death."""

OF_THE_HOST = (
    "can't allocate memory",  # PyTorch's allocator of host memory
    "not enough memory: you tried to allocate",
    "cannot allocate memory",
    "running low on memory",  # Ray's monitor, which kills a process before the kernel does
)
WORDS = (
    "out of memory",  # CUDA's, NCCL's, and the kernel's in a message of Ray's monitor
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "outofmemoryerror",
    *OF_THE_HOST,
)
"""Of messages, in lower case."""

GUESSED = "oom killer"
"""Ray names it among the possible causes of any death, so a line with it says nothing."""


def out_of_memory(error: BaseException) -> str:
    """What ``error`` says, in one line, where it means that memory was too small; empty otherwise."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, MemoryError | cuda.OutOfMemoryError):
        return f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return lines[0]
    return said_of_memory(str(error)) if isinstance(error, RuntimeError) else ""


def said_of_memory(text: str) -> str:
    """The first line of ``text``, what a process left behind or Ray says of its death, that means out of memory."""
    for line in text.splitlines():
        low = line.lower()
        if GUESSED not in low and any(words in low for words in WORDS):
            return line.strip()
    return ""


def is_of_the_host(words: str) -> bool:
    """Whether ``words``, which mean out of memory, speak of the host's: a larger card would not help."""
    low = words.lower()
    return low.startswith("memoryerror") or any(part in low for part in (*OF_THE_HOST, KERNEL))


def kernel_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel of this host has killed for want of memory since it started; 0 where it does not
    tell. That Ray's reports of a death do not."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
