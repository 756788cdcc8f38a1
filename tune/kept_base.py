"""The frozen base of a trial stays in its process for the next trial, which need not read and quantise it again."""

import gc
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from workloads.training.adapters import load_base
from workloads.training.config import Kernel
from workloads.training.fsdp import decoder_layers


class KeptBase:
    """Loads as ``load_base`` does, and gives the model of the trial before, without its adapter, where it is alike.

    Only for frozen bases: what trains all weights must load its own.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: Any = None
        self._forwards: list[Any] = []

    def __call__(
        self,
        base: str,
        dtype: str,
        quantization: Literal["nf4", "none"],
        device: torch.device,
        *,
        kernel: Kernel = "auto",
        unquantized: Collection[str] = (),
    ) -> Any:
        """The base, frozen or not: what it was before a trial put its adapter on."""
        key = (base, dtype, quantization, device, kernel, tuple(unquantized))
        if key == self._key:
            restore(self._model, self._forwards)
            return self._model
        self.drop()
        self._model = load_base(base, dtype, quantization, device, kernel=kernel, unquantized=unquantized)
        self._key, self._forwards = key, [layer.__dict__.get("forward") for layer in decoder_layers(self._model)]
        return self._model

    def drop(self) -> None:
        """Give its memory back."""
        self._key, self._model = (), None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def restore(model: nn.Module, forwards: Sequence[Any]) -> None:
    """Take PEFT's layers off ``model``, in place, and what ``prepare_layers`` laid around a decoder layer, whose own
    ``forward`` was in ``forwards``, None for its class'."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    done: list[str] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{outer}.") for outer in done):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
            done.append(path)
    for layer, forward in zip(decoder_layers(model), forwards, strict=True):
        layer.__dict__.pop("forward", None)
        if forward is not None:
            layer.forward = forward
    for name in ("peft_config", "_hf_peft_config_loaded", "active_adapter"):
        model.__dict__.pop(name, None)
    model.zero_grad(set_to_none=True)
