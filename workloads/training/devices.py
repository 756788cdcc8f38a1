"""The device of a worker: the card that Ray handed out, the one its environment names, the Mac's, or the CPU."""

from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import TorchConfigContextManager, _TorchBackend

from cluster.placement import Placement
from workloads.training.config import TrainingConfig


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


def torch_config(placement: Placement) -> TorchConfig:
    """How Ray Train sets up torch in workers of ``placement``."""
    return CardsByEnvironment(backend="nccl") if placement.visible else TorchConfig()


def device_of(config: TrainingConfig) -> torch.device:
    """The device of this Ray Train worker."""
    if not config.gpus_per_worker:
        return local_device(config)
    import ray
    import ray.train.torch

    if (config.resources is not None and config.resources.all_on) or not ray.get_gpu_ids():
        return torch.device("cuda", _local_rank())
    return ray.train.torch.get_device()


def local_device(config: TrainingConfig) -> torch.device:
    """The first card that this process may see, the Mac's own, or the CPU with as many threads as Ray reserved."""
    if config.gpus_per_worker:
        return torch.device("cuda", 0)
    if config.resources is not None and config.resources.mps:
        return torch.device("mps")
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    return torch.device("cpu")


def _local_rank() -> int:
    """The worker's place among those of its list: its local rank, or 0 where each worker sees one card alone."""
    import ray.train

    return int(ray.train.get_context().get_local_rank()) % max(1, torch.cuda.device_count())
