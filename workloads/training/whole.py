"""Trained weights as a whole model in full precision: an adapter on the base as it was while it was trained, a
checkpoint of all weights, an NF4 base that is undone.

model = with_adapter(undone_base(base, "bfloat16", "bfloat16"), run / "artifacts/adapter")
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils.parametrize import ParametrizationList

from workloads.training.adapters import load_base
from workloads.training.checkpoint import OPTIONS
from workloads.training.nf4 import NF4Linear, NF4Stack, undo

CPU = torch.device("cpu")


def undone_base(base: str, compute_dtype: str, dtype: str, unquantized: Collection[str] = ()) -> Any:
    """The model at ``base`` in ``dtype``, its weights rounded to NF4 where training had them so.

    They are the numbers that training in ``compute_dtype`` computed with, to the last bit where ``dtype`` is that one
    or a wider one. ``unquantized`` as for ``load_base``. Both models are in memory for the time of the call.
    """
    whole = load_base(base, dtype, "none", CPU)
    packed = load_base(base, compute_dtype, "nf4", CPU, unquantized=unquantized)
    for path, module in packed.named_modules():
        if isinstance(module, NF4Linear):
            layer = whole.get_submodule(path)
            weight = _undone(module, module.weight, compute_dtype)
            layer.weight.data.copy_(weight if isinstance(layer, nn.Linear) else weight.T)  # Conv1D of GPT-2
        elif isinstance(module, ParametrizationList) and isinstance(module[0], NF4Stack):
            owner, _, name = path.rpartition(".parametrizations.")
            getattr(whole.get_submodule(owner), name).data.copy_(_undone(module[0], module.original, compute_dtype))
    return whole


def _undone(scales: Any, packed: torch.Tensor, dtype: str) -> torch.Tensor:
    return undo(
        packed, scales.absmax, scales.nested_absmax, scales.tables, scales.shape, getattr(torch, dtype), scales.kernel
    )


def with_adapter(whole: Any, adapter: Path) -> Any:
    """``whole`` with the update of the adapter at ``adapter`` added to its weights: each sum is taken in float32 and
    rounded once to the dtype of ``whole``."""
    from peft import PeftModel

    return PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()


def load_trained(checkpoint: Path, model: nn.Module) -> None:
    """Load the trained weights of a folder ``step-00000120`` into ``model``, in this process alone, from however many
    ranks they were written."""
    state = {"model": get_model_state_dict(model, options=OPTIONS)}
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    set_model_state_dict(model, state["model"], options=OPTIONS)
