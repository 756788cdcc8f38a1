"""The device of a worker: the card that Ray handed out, the one its environment names, the Mac's, or the CPU."""

from typing import Any

import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import TorchConfigContextManager, _TorchBackend

from cluster.placement import Placement
from workbench.errors import UserError
from workloads.training.config import TrainingConfig


class CardTooSmall(UserError):
    """What a worker holds is estimated to be more than its card has."""


class _OwnList(_TorchBackend):
    """Ray Train would narrow each worker's list of cards to those that Ray counts as ``GPU``."""

    share_cuda_visible_devices = False


class _CardOfLocalRank(TorchConfigContextManager):
    def __enter__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(_local_rank())


class CardsByEnvironment(TorchConfig):
    """Workers whose environment says which cards they see: a worker takes the one of its local rank."""

    @property
    def backend_cls(self) -> Any:
        """NCCL or gloo as always, with the environment left alone."""
        return _OwnList

    @property
    def train_func_context(self) -> Any:
        """What surrounds the training function."""
        return _CardOfLocalRank


def torch_config(placement: Placement, config: TrainingConfig) -> TorchConfig:
    """How Ray Train sets up torch in workers of ``placement``: gradients that are kept in the host's memory meet over
    gloo."""
    backend = backend_of(config)
    return CardsByEnvironment(backend=backend) if placement.visible else TorchConfig(backend=backend)


def backend_of(config: TrainingConfig) -> str:
    """What gradients of ``config``'s workers meet over."""
    if not config.gpus_per_worker:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if config.strategy == "fsdp2-offload" else "nccl"


def device_of(config: TrainingConfig) -> torch.device:
    """The device of this Ray Train worker."""
    if not config.gpus_per_worker:
        return local_device(config)
    import ray
    import ray.train.torch

    if (config.resources is not None and config.resources.all_on) or not ray.get_gpu_ids():
        return torch.device("cuda", _local_rank())
    return ray.train.torch.get_device()


def check_cards(needed: int, device: torch.device, share: float) -> None:
    """Raise CardTooSmall, on every rank, where a rank's card, of which it may have ``share``, holds less than
    ``needed`` bytes of tensors: what was asked for by name may still be of several sizes. Collective. ``needed`` 0 is
    unknown."""
    if not needed or device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(device)
    cards: list[Any] = [(card.name, card.total_memory)]
    if dist.is_initialized():
        cards = [None] * dist.get_world_size()
        dist.all_gather_object(cards, (card.name, card.total_memory))
    refuse_small(needed, cards, share)


def refuse_small(needed: int, cards: list[tuple[str, int]], share: float) -> None:
    """Raise CardTooSmall where ``share`` of the smallest of ``cards``, name and bytes by rank, is less than
    ``needed``."""
    rank, (name, memory) = min(enumerate(cards), key=lambda ranked: ranked[1][1])
    if needed > memory * share:
        raise CardTooSmall(
            f"each worker needs {needed / 2**30:.1f} GiB for tensors (estimated), and worker {rank} got {name} with "
            f"{memory * share / 2**30:.1f}: ask for larger cards by resources.gpu.memory, or look with --plan"
        )


def local_device(config: TrainingConfig, local_rank: int = 0) -> torch.device:
    """The card of ``local_rank`` among those that this process may see, the Mac's own, or the CPU with as many threads
    as Ray reserved."""
    if config.gpus_per_worker:
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    if config.resources is not None and config.resources.mps:
        return torch.device("mps")
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    return torch.device("cpu")


def _local_rank() -> int:
    """The worker's place among those of its list: its local rank, or 0 where each worker sees one card alone."""
    import ray.train

    return int(ray.train.get_context().get_local_rank()) % max(1, torch.cuda.device_count())
