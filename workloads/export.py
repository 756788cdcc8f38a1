"""Hand on what was trained: merged weights, the adapter, or one GGUF file, each a folder with a model card.

    workbench train export train-sft/latest
    workbench train export train-dpo/20261121T120000 format=gguf out=/models/mine

``safetensors`` is a model that Transformers and vLLM load without PEFT: the adapter is added to the base as it was
while it was trained, in NF4 where it was. ``base`` is that base alone, for servers that put adapters on a base and
cannot quantise it as training did. The folder appears whole or not at all, and never in place of another.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from workbench.config import Config, OutputPath
from workbench.errors import Failure, UserError
from workbench.files import write_json
from workbench.runs import Run, Summary
from workloads.chat_templates import end_generation, load_tokenizer
from workloads.instructions import SPLIT_FILE
from workloads.model_card import FORMATS, write_card
from workloads.sft import TuningConfig, keep_split_seed
from workloads.sources import ModelSource
from workloads.trained_run import TrainedRun, find_trained


class ExportConfig(Config):
    """Config of ``train export``."""

    run: str = Field(description="a run of train sft, dpo or pretrain: GROUP-COMMAND/TIME, or train-sft/latest")
    format: Literal["safetensors", "adapter", "base", "gguf"] = Field(
        "safetensors", description="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    )
    out: OutputPath | None = Field(None, description="the folder to make; none: artifacts/model of this run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: as the base is stored, or as all weights were trained"
    )
    step: int | None = Field(None, description="of a checkpoint; none: the end, or the last good checkpoint")
    base: ModelSource | None = Field(None, description="where the base lies now; none: where the run found it")
    shard_gb: float = Field(5, gt=0, description="size of a file of safetensors at most")


def check(config: ExportConfig) -> None:
    """Raise UserError for a run without weights, a base that is gone, a format that it cannot have, and a folder that
    exists or has no room."""
    trained = find_trained(config.run, config.step, config.base)
    if not trained.is_adapter and config.format in ("adapter", "base"):
        raise UserError(
            f"{trained.record.id} trained all weights: there is no {config.format}; give format=safetensors"
        )
    if config.format == "adapter" and config.dtype != "auto":
        raise UserError("an adapter is handed on as it was trained: leave dtype out")
    if config.format == "base" and not trained.quantized:
        raise UserError(f"the base of {trained.record.id} was not quantised: serve {trained.base} as it is")
    if config.format == "gguf":
        from workloads.gguf_file import check_convertible

        check_convertible(_config_of(trained), _tokenizer(trained))
    if config.out is not None:
        if config.out.exists():
            raise UserError(f"out: {config.out} exists, and is not replaced: name a folder that does not")
        _check_room(config.out, _size(config, trained))


def run(config: ExportConfig, run: Run) -> Summary:
    """Write the folder, its model card last."""
    check(config)
    trained = find_trained(config.run, config.step, config.base)
    if trained.is_adapter and config.format != "adapter":
        trained.refuse_changed_base()
    run.input("run", run=trained.record.id, weights=trained.weights.name)
    out = config.out or run.artifact("model")
    _check_room(out, _size(config, trained))
    run.say(f"exporting {trained.weights} as {FORMATS[config.format]}")
    with whole_folder(out) as folder:
        dtype = _write(config, trained, folder)
        write_card(trained, config.format, dtype, folder, out.name)
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
    run.report.heading("Exported", FORMATS[config.format])
    run.report.text("Model card", (out / "README.md").read_text(encoding="utf-8"))
    return {"folder": str(out), "format": config.format, "of": trained.record.id, "weights": trained.weights.name,
            "dtype": dtype, "files": len(files), "bytes": size}  # fmt: skip


def _write(config: ExportConfig, trained: TrainedRun, folder: Path) -> str:
    """Fill ``folder``; returns the dtype of the weights."""
    tokenizer = _tokenizer(trained)
    if config.format == "adapter":
        shutil.copytree(trained.adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("history.json"))
        tokenizer.save_pretrained(str(folder))
        _mark_split(trained, folder)
        return _dtype_of(folder / "adapter_model.safetensors")
    dtype = _dtype(config, trained)
    model = _model(trained, dtype, adapted=config.format != "base")
    if config.format == "gguf":
        from workloads.gguf_file import write_gguf

        write_gguf(model, tokenizer, folder / f"{folder.name}.gguf", dtype)
        return dtype
    model.save_pretrained(str(folder), max_shard_size=int(config.shard_gb * 1e9))
    tokenizer.save_pretrained(str(folder))
    end_generation(folder)
    _mark_split(trained, folder)
    return dtype


def _mark_split(trained: TrainedRun, folder: Path) -> None:
    """Note which chemistry split the weights have seen, where they have."""
    if isinstance(trained.config, TuningConfig):
        keep_split_seed(trained.base, folder)
    else:
        write_json(folder / SPLIT_FILE, {"split_seed": trained.config.split_seed})


def _dtype_of(weights: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as file:
        return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")


def _model(trained: TrainedRun, dtype: str, adapted: bool) -> Any:
    """The whole model in ``dtype`` on the CPU; with ``adapted`` false the base alone, as it was trained on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from workloads.training.adapters import load_base, target_names
    from workloads.training.whole import CPU, load_trained, undone_base, with_adapter

    logging.disable_progress_bar()
    config, number = trained.config, getattr(torch, dtype)
    if trained.is_adapter:
        assert isinstance(config, TuningConfig)
        if trained.quantized:
            whole = undone_base(trained.base, config.compute_dtype, dtype, target_names(config.adapter))
        else:
            whole = load_base(trained.base, dtype, "none", CPU)
        return with_adapter(whole, trained.adapter) if adapted else whole
    if trained.checkpoint is None:
        return AutoModelForCausalLM.from_pretrained(trained.model, dtype=number)
    if isinstance(config, TuningConfig):
        tuned = load_base(trained.base, config.compute_dtype, "none", CPU)
        load_trained(trained.checkpoint, tuned)
        return tuned.to(number)
    from workloads.pretraining import llama_config
    from workloads.training.transformer import Transformer, to_llama

    made = Transformer(llama_config(config, AutoTokenizer.from_pretrained(trained.model)))
    load_trained(trained.checkpoint, made)
    return to_llama(made.config, dict(made.state_dict())).to(number)


def _tokenizer(trained: TrainedRun) -> Any:
    """With the chat template that it was trained with."""
    from transformers import AutoTokenizer

    if trained.checkpoint is not None and isinstance(trained.config, TuningConfig):
        return load_tokenizer(trained.base, trained.config.chat_template)
    return AutoTokenizer.from_pretrained(trained.adapter if trained.is_adapter else trained.model)


def _config_of(trained: TrainedRun) -> Any:
    """The architecture, as Transformers describes it."""
    from transformers import AutoConfig, AutoTokenizer

    if not trained.is_adapter and trained.checkpoint is None:
        return AutoConfig.from_pretrained(trained.model)
    if isinstance(trained.config, TuningConfig):
        return AutoConfig.from_pretrained(trained.base)
    from workloads.pretraining import llama_config

    return llama_config(trained.config, AutoTokenizer.from_pretrained(trained.model))


def _dtype(config: ExportConfig, trained: TrainedRun) -> str:
    if config.dtype != "auto":
        return config.dtype
    if isinstance(trained.config, TuningConfig) and not trained.is_adapter and trained.checkpoint is not None:
        return trained.config.compute_dtype
    return str(_config_of(trained).dtype or "float32").removeprefix("torch.")


def _size(config: ExportConfig, trained: TrainedRun) -> int:
    """Bytes of the weights that will be written."""
    import torch
    from transformers import AutoModelForCausalLM

    if config.format == "adapter":
        return sum(file.stat().st_size for file in trained.adapter.rglob("*") if file.is_file())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config_of(trained))
    size: int = getattr(torch, _dtype(config, trained)).itemsize
    return size * sum(parameter.numel() for parameter in model.parameters())


def _check_room(out: Path, needed: int) -> None:
    at = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(at).free
    if needed > free:
        raise UserError(f"out: {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free at {at}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends and is removed where it fails.

    Raises UserError where it cannot be made, Failure where it cannot be written (a full disk, for instance) or ``out``
    has come to exist meanwhile.
    """
    from safetensors import SafetensorError

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial") / out.name
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be made: {error.strerror}") from None
    try:
        yield partial
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and out.exists():
            raise Failure(f"{out} was made by somebody else meanwhile: name another folder") from error
        raise Failure(f"{out} could not be written, and nothing of it is left: {error}") from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)
