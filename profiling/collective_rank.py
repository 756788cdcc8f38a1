"""One rank of ``workbench profile collectives``: joins a process group, runs a collective, checks what came out.

Sizes and bandwidths are those of nccl-tests (its doc/PERFORMANCE.md): the size of an all-gather is that of the gathered
buffer, of a reduce-scatter that of the whole input, of an all-to-all that of one rank's buffer.
"""

import datetime
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from workbench.config import default_environment

PERIOD = 17
"""Of the made values along a buffer: small whole numbers, whose sums float32 has exactly."""


def free_port() -> int:
    """A port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_of(address: str) -> str:
    """The network interface that has ``address``; loopback's for any address of it, empty where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.address == address or (address.startswith("127.") and one.address == "127.0.0.1"):
                return name
    return ""


class Rank:
    """A worker of the group; a Ray actor, or a process of a test's."""

    def where(self) -> tuple[str, str, int]:
        """This worker's host, its address for others, and a port that is free there."""
        import ray

        return socket.gethostname(), ray.util.get_node_ip_address(), free_port()

    def join(self, rank: int, ranks: int, address: str, own: str, timeout: float) -> str:
        """Join the group that rank 0 holds at ``address`` (HOST:PORT), by NCCL where torch has a card, else gloo.

        ``own`` is this worker's address: its interface is the one to use, unless the environment names another.
        Returns the backend and the device.
        """
        cuda = torch.cuda.is_available()
        if interface := interface_of(own):
            default_environment("GLOO_SOCKET_IFNAME", interface)
            default_environment("NCCL_SOCKET_IFNAME", interface)
        self._device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl" if cuda else "gloo", init_method=f"tcp://{address}", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )  # fmt: skip
        self._rank, self._ranks = rank, ranks
        return f"{dist.get_backend()} on {torch.cuda.get_device_name() if cuda else 'CPU'}"

    def prepare(self, operation: str, size: int) -> int:
        """Make the buffers of ``operation`` over ``size`` bytes; how many bytes that is among these ranks."""
        self._operation, self._count = operation, max(1, size // 4 // self._ranks) * self._ranks
        given = torch.zeros(self._given(operation, self._count), device=self._device)
        out = torch.empty(self._out(operation, self._count), device=self._device)
        self._run = self._call(operation, given, out)
        return 4 * self._count

    def check(self) -> int:
        """Run what was prepared once on made values; how many numbers came out wrong."""
        return self._wrong(self._operation, self._count)

    def measure(self, repeats: int) -> float:
        """Seconds of what was prepared, as the mean of ``repeats`` in a row."""
        dist.barrier()
        self._wait()
        begun = time.perf_counter()
        for _ in range(repeats):
            self._run()
        self._wait()
        return (time.perf_counter() - begun) / repeats

    def leave(self) -> None:
        """Take the group apart."""
        dist.destroy_process_group()

    def _given(self, operation: str, count: int) -> int:
        return count // self._ranks if operation == "all-gather" else count

    def _out(self, operation: str, count: int) -> int:
        return count // self._ranks if operation == "reduce-scatter" else count

    def _call(self, operation: str, given: Tensor, out: Tensor) -> Callable[[], Any]:
        calls: dict[str, Callable[[], Any]] = {
            "all-reduce": lambda: dist.all_reduce(given),
            "all-gather": lambda: dist.all_gather_single(out, given),
            "reduce-scatter": lambda: dist.reduce_scatter_single(out, given),
            "all-to-all": lambda: dist.all_to_all_single(out, given),
        }
        return calls[operation]

    def _wrong(self, operation: str, count: int) -> int:
        """Run once on made values; how many of those that came out are not what they must be."""
        part = count // self._ranks
        waves = torch.arange(count, device=self._device) % PERIOD
        one = torch.arange(part, device=self._device) % PERIOD
        made: dict[str, tuple[Tensor, Tensor]] = {
            "all-reduce": (self._rank + 1 + waves, self._sum(waves)),
            "all-gather": (self._rank + 1 + one, torch.cat([r + 1 + one for r in range(self._ranks)])),
            "reduce-scatter": (
                self._rank + 1 + waves, self._sum(waves)[self._rank * part : (self._rank + 1) * part]
            ),
            "all-to-all": (
                torch.cat([self._rank * self._ranks + to + one for to in range(self._ranks)]),
                torch.cat([sent * self._ranks + self._rank + one for sent in range(self._ranks)]),
            ),
        }  # fmt: skip
        given, expected = (tensor.float() for tensor in made[operation])
        out = torch.full_like(expected, -1.0)
        self._call(operation, given, out)()
        self._wait()
        came = given if operation == "all-reduce" else out
        return int((came != expected).sum())

    def _sum(self, waves: Tensor) -> Tensor:
        return self._ranks * (self._ranks + 1) // 2 + self._ranks * waves

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
