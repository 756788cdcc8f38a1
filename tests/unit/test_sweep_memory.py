"""Out of memory is known in every form; other errors are not taken for it."""

import errno
from pathlib import Path

import pytest
import torch

from tune.group import last_words
from tune.memory import is_of_the_host, kernel_kills, out_of_memory, said_of_memory

RAY_OF_ANY_DEATH = (
    "The actor died unexpectedly before finishing this task.\n"
    "There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory usage."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_errors_of_memory(error: Exception) -> None:
    assert out_of_memory(error)


def test_pytorch_itself_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(errno.ENOENT, "")]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert out_of_memory(error) == ""


def test_a_death_is_of_memory_only_where_ray_says_so() -> None:
    assert said_of_memory(RAY_OF_ANY_DEATH) == ""
    said = "Task was killed due to the node running low on memory."
    assert said_of_memory(f"ray.exceptions.ActorDiedError: it died\n{said}") == said


def test_of_a_death_the_line_is_kept_that_says_most() -> None:
    because = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    told = f"ray.exceptions.ActorDiedError: it died\n{because} Some common causes include: (1) the OOM killer\n"
    assert last_words(told) == because
    assert last_words("Traceback\n  line\ntune.group.WorkerLost: worker 1: gone\n").endswith("worker 1: gone")
    assert last_words("") == "its process has died"
    assert len(last_words("x" * 1000)) < 320


def test_the_kernel_counts_what_it_kills(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    assert kernel_kills(tmp_path / "vmstat") == 3
    assert kernel_kills(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("words", "of_the_host"),
    [
        ("Task was killed due to the node running low on memory.", True),
        (out_of_memory(MemoryError()), True),
        ("its host's kernel has killed a process for want of memory meanwhile", True),
        ("worker 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("each worker needs 3.0 GiB for tensors (estimated)", False),
    ],
)
def test_memory_of_the_host_is_told_from_the_cards(words: str, of_the_host: bool) -> None:
    assert is_of_the_host(words) is of_the_host
