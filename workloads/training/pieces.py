"""A base that is loaded piece by piece: each rank reads a decoder layer, quantises it and keeps its shard of it before
it reads the next. No rank ever has the whole base.

    pieces = Pieces.of(base, "bfloat16", "nf4", device, kernel)     # None: this base must be loaded whole
    model = add_adapter(pieces.model, adapter)                      # draws what it draws on the base itself
    shard(model, torch.bfloat16, fill=pieces.fill)                  # fills a layer, shards it, then the next

``model`` has every weight as a tensor of the right shape and dtype that takes no memory. ``fill`` reads the weights of
a module from safetensors files, where they have the names and shapes of the model. A base whose files hold its weights
in another form (a mixture of experts, whose stacks Transformers makes of many), or not in safetensors, and one with
buffers that only loading fills, is loaded whole.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workloads.training.adapters import linear_layers
from workloads.training.nf4 import NF4Linear, quantized

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Pieces:
    """``model`` and where its weights are. ``device`` is what the shards will be on."""

    def __init__(self, model: Any, files: dict[str, Path], device: torch.device) -> None:
        self.model = model
        self._files, self._device = files, device
        self._names = {id(module): path for path, module in model.named_modules()}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append((module, own))
        self._tied = {(id(module), own): places for places in owners.values() for module, own in places}
        self._empty = set(self._tied)

    @classmethod
    def of(
        cls, base: str, dtype: str, quantization: Literal["nf4", "none"], device: torch.device, kernel: str
    ) -> "Pieces | None":
        """The pieces of ``base``; None where it must be loaded whole."""
        files = _files(base)
        model = None if files is None else _empty(base, getattr(torch, dtype))
        if files is None or model is None or not _same(model, files):
            return None
        if quantization == "nf4":
            layers = linear_layers(model)
            if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
                return None
            for path, layer in layers.items():
                model.set_submodule(path, quantized(layer, getattr(torch, dtype), kernel))
        _hollow(model)
        return cls(model, files, device)

    def fill(self, module: nn.Module) -> None:
        """Read the weights of ``module`` and all that is in it, except what was read before."""
        for inner in module.modules():
            wanted = [name for name in inner._parameters if (id(inner), name) in self._empty]
            if not wanted:
                continue
            if isinstance(inner, NF4Linear):
                self._quantise(inner)
            else:
                for name in wanted:
                    self._set(inner, name, self._read(inner, name, inner._parameters[name].dtype))

    def _quantise(self, module: NF4Linear) -> None:
        """One weight at a time is whole and in full precision."""
        whole = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        for name in list(whole._parameters):
            if whole._parameters[name] is not None:
                whole._parameters[name] = nn.Parameter(self._read(module, name, module.compute_dtype), False)
        made = quantized(whole, module.compute_dtype, module.kernel)
        module.tables = made.tables
        for name, parameter in made.named_parameters():
            self._set(module, name, parameter.data)

    def _read(self, module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
        from safetensors import safe_open

        path = f"{self._names[id(module)]}.{name}"
        key = next(key for key in self._known_as(module, name, path) if key in self._files)
        with safe_open(self._files[key], framework="pt", device="cpu") as stored:
            read: Tensor = stored.get_tensor(key).to(self._device, dtype)
        return read

    def _known_as(self, module: nn.Module, name: str, path: str) -> Iterator[str]:
        yield path
        for other, own in self._tied[id(module), name]:
            yield f"{self._names[id(other)]}.{own}"

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        trained = module._parameters[name].requires_grad
        parameter = nn.Parameter(value, requires_grad=trained)
        for owner, own in self._tied[id(module), name]:
            owner._parameters[own] = parameter
            self._empty.discard((id(owner), own))


def _files(base: str) -> dict[str, Path] | None:
    """The safetensors file of each weight that is stored for ``base``, a folder or a hub name; None without such."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    found = {
        name: cached_file(
            base, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )
        for name in (INDEX, SINGLE)
    }
    if found[INDEX] is not None:
        shards: dict[str, str] = json.loads(Path(found[INDEX]).read_text())["weight_map"]
        paths = {shard: cached_file(base, shard) for shard in set(shards.values())}
        return {name: Path(paths[shard]) for name, shard in shards.items()}
    if found[SINGLE] is None:
        return None
    with safe_open(found[SINGLE], framework="pt") as stored:
        return dict.fromkeys(stored.keys(), Path(found[SINGLE]))


def _empty(base: str, dtype: torch.dtype) -> Any:
    """The model of ``base`` on the meta device, but with its buffers; None where their values are not known here."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        if list(module.parameters()) or not hasattr(module, "rope_type"):
            return None
        again = type(module)(module.config)
        for name in names:
            setattr(module, name, getattr(again, name))
    if (Path(base) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base)
    return model.eval()


def _same(model: Any, files: dict[str, Path]) -> bool:
    """Whether every weight of ``model`` is stored under its name, or that of one it is tied to, and in its shape."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in set(files.values()):
        with safe_open(file, framework="pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return all(
        any(shapes.get(name) == list(parameter.shape) for name in names[id(parameter)])
        for parameter in model.parameters()
    )


def _hollow(model: nn.Module) -> None:
    """Give every parameter a tensor on the CPU of one number, seen in its shape: an adapter can be put on it."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            made = hollow.setdefault(id(parameter), nn.Parameter(one, requires_grad=parameter.requires_grad))
            module._parameters[name] = made
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
