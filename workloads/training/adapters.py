"""Loading a base model, whole or in NF4; putting a LoRA adapter on it; saving and merging the adapter.

QLoRA is Dettmers et al. 2023, arXiv:2305.14314; LoRA is Hu et al. 2021, arXiv:2106.09685.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from workloads.training.config import AdapterConfig


def load_base(base: str, dtype: str, quantization: Literal["nf4", "none"], device: torch.device) -> Any:
    """The causal language model at ``base`` (a folder or a hub name) in ``dtype``, on ``device``.

    NF4 is stored in ``dtype``, not in bytes: FSDP2 then moves the packed weights like any other parameter.
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
        bnb_4bit_quant_storage=number,
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=number, quantization_config=nf4, device_map={"": device})


def add_adapter(model: Any, adapter: AdapterConfig) -> Any:
    """Freeze ``model`` and put a new adapter on it, drawn from torch's generator: seed it alike on every rank."""
    from peft import LoraConfig, get_peft_model

    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


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
