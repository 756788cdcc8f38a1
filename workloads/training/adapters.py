"""Loading a base model, whole or in NF4; putting a LoRA adapter on it; saving and merging the adapter.

QLoRA is Dettmers et al. 2023, arXiv:2305.14314; LoRA is Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from workloads.training.config import AdapterConfig, Kernel
from workloads.training.nf4 import kernel_for, quantize_experts, stacked_experts, use_nf4_linear

ALL_LINEAR = "all-linear"


def load_base(
    base: str,
    dtype: str,
    quantization: Literal["nf4", "none"],
    device: torch.device,
    *,
    kernel: Kernel = "auto",
    unquantized: Collection[str] = (),
) -> Any:
    """The causal language model at ``base`` (a folder or a hub name) in ``dtype``, on ``device``.

    With NF4 every linear layer but the head is an ``NF4Linear``, and stacked experts are quantised too, except those
    that ``unquantized`` names (an adapter's targets: PEFT adds their update to the whole stack).
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    number = getattr(torch, dtype)
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(base, dtype=number).to(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=number,
    )
    # Stacked experts are read in full precision: more than a card may hold, so they go there one by one, packed.
    first = torch.device("cpu") if stacked_experts(empty_model(base)) else device
    model = AutoModelForCausalLM.from_pretrained(base, dtype=number, quantization_config=nf4, device_map={"": first})
    use_nf4_linear(model, kernel_for(kernel, device))
    quantize_experts(model, device, kernel_for(kernel, device), unquantized)
    return model.to(device)


def empty_model(base: str) -> Any:
    """The model at ``base`` without weights, on torch's meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def add_adapter(model: Any, adapter: AdapterConfig) -> Any:
    """Freeze ``model`` and put a new adapter on it, drawn from torch's generator: seed it alike on every rank.

    A target is the name of linear layers, or of a weight that holds a stack of experts (``experts.down_proj``);
    all-linear are the ``adaptable_layers``.
    """
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = target_names(adapter)
    stacks = [f"{name}.{own}" for name, _, own in stacked_experts(model)]
    experts = [name for name in names if any(is_named(stack, name) for stack in stacks)]
    linear = [name for name in names if name not in experts] if names else list(adaptable_layers(model))
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=linear or None,
        target_parameters=experts or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def linear_layers(model: Any) -> dict[str, Any]:
    """What ``load_in_4bit`` quantises: path and layer, the head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def adaptable_layers(model: Any) -> dict[str, Any]:
    """The linear layers that PEFT can adapt: all, or in a mixture of experts those that it does not mistake.

    Transformers 5 stacks experts that were linear layers named ``gate_proj`` or ``w1`` before, and PEFT 0.21 takes such
    a name for the stack, also where it is a shared expert's layer.
    """
    layers = linear_layers(model)
    if not stacked_experts(model):
        return layers
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    taken = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, ""), {})
    return {path: layer for path, layer in layers.items() if path.rpartition(".")[2] not in taken}


def target_names(adapter: AdapterConfig) -> list[str]:
    """The names that an adapter's ``targets`` gives; none for all-linear."""
    names = [adapter.targets] if isinstance(adapter.targets, str) else adapter.targets
    return [] if names == [ALL_LINEAR] else names


def is_named(path: str, target: str) -> bool:
    """Whether ``path`` (``model.layers.0.self_attn.q_proj``) ends with the whole parts of ``target`` (``q_proj``)."""
    return path == target or path.endswith(f".{target}")


def save_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write adapter weights and config. ``state`` has every shard gathered; call it on one rank."""
    model.save_pretrained(str(folder), state_dict=state)


def merge(base: str, adapter: Path, folder: Path, tokenizer: Any, dtype: str) -> None:
    """Write ``base`` in full precision with the adapter added to its weights, a model that needs no PEFT to load."""
    from peft import PeftModel

    whole = load_base(base, dtype, "none", torch.device("cpu"))
    merged = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer should hold."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
