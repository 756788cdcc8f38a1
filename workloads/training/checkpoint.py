"""Checkpoints by ``torch.distributed.checkpoint``: trainable weights, optimizer moments and the step, in shards.

A checkpoint made by one number of ranks loads on another. Frozen weights are left out: they come from the base.
"""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's shards to ``folder``. Collective."""
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(folder), no_dist=not _distributed())
    (folder / "step.json").write_text(json.dumps({"step": step}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and moments into ``model`` and ``optimizer``; returns the step they are from. Collective."""
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=str(folder), no_dist=not _distributed())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=OPTIONS
    )
    return int(json.loads((folder / "step.json").read_text())["step"])


def _distributed() -> bool:
    return torch.distributed.is_initialized()
