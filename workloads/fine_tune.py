"""One fine-tuning: what a Ray Train worker of ``train sft`` and ``dpo`` and a trial of ``tune run`` all do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workloads.chat_templates import load_tokenizer
from workloads.dpo import DpoConfig
from workloads.prepared import batches_of
from workloads.sft import SftConfig
from workloads.streaming import StreamedBatches
from workloads.tokenized import TokenRows
from workloads.training.adapters import add_adapter, load_base, save_adapter, target_names, trainable_parameters
from workloads.training.batches import Row
from workloads.training.checkpoint import Export
from workloads.training.compiling import prepare_layers
from workloads.training.devices import check_cards, device_of
from workloads.training.distillation import distillation
from workloads.training.fsdp import full_state, sharded_bytes
from workloads.training.history import History
from workloads.training.loop import Events, train
from workloads.training.nf4 import kernel_for
from workloads.training.objective import Objective
from workloads.training.packing import check_packing
from workloads.training.pairs import Pairs
from workloads.training.pieces import Pieces
from workloads.training.preference_loss import PreferenceLoss
from workloads.training.ray_train import WorkerEvents
from workloads.training.resume import SAMPLES
from workloads.training.samples import Sampler
from workloads.training.strategies import is_fsdp, loads_on, optimizer_of, shard_model
from workloads.training.trainable import positions_of


@dataclass(frozen=True)
class FineTuned:
    """What came out on this rank; ``storage`` has the bytes of the parameters it holds and of the whole model."""

    history: History
    storage: dict[str, int]
    trained_parameters: int
    resumed_from: int


def tuning_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """The training function of a Ray Train worker; returns rank 0's results and every rank's bytes."""
    import ray.train

    config: SftConfig | DpoConfig = payload["config"]
    rank, device = ray.train.get_context().get_world_rank(), device_of(config)
    check_cards(payload["needed"], device, config.request().gpu_share)
    stream, validation = payload.get("stream"), TokenRows(Path(payload["validation"]))
    rows = TokenRows(Path(payload["train"])) if stream is None else StreamedBatches(stream)
    export = export_adapter if config.method == "lora" else None
    with WorkerEvents(Path(payload["run_folder"]), rank, config, export) as events:
        done = fine_tune(
            config, rows, validation, device=device, events=events, result=Path(payload["result"]),
            rank=rank, questions=payload["questions"],
        )  # fmt: skip
    storage: list[Any] = [done.storage]
    if torch.distributed.is_initialized():
        storage = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(storage, done.storage)
    return {
        "train": done.history.train, "validation": done.history.validation, "best": done.history.best,
        "result": events.loaded or done.history.validation[-1],
        "steps": done.history.step, "stopped_early": done.history.stopped_early, "storage": storage,
        "trained_parameters": done.trained_parameters, "resumed_from": done.resumed_from,
    }  # fmt: skip


def fine_tune(
    config: SftConfig | DpoConfig,
    rows: Sequence[Row] | StreamedBatches,
    validation: Sequence[Row],
    *,
    device: torch.device,
    events: Events,
    result: Path,
    rank: int = 0,
    questions: Sequence[tuple[str, str]] = (),
    load: Callable[..., Any] = load_base,
) -> FineTuned:
    """Fine-tune ``config.base`` on ``rows``, or on batches that are still being made, and write the adapter (or, with
    method full, the model) to ``result``, with the tokenizer and its chat template. Runs on every rank of the process
    group, or alone where there is none.

    For a DpoConfig the rows, also those of ``validation``, are chosen and rejected answers in turn.
    ``questions`` are (prompt, right answer) that the model is asked meanwhile. ``load`` stands in for ``load_base``.
    """
    tokenizer = load_tokenizer(config.base, config.chat_template)

    kernel: Any = kernel_for(config.nf4_kernel, device)
    what = config.base, config.compute_dtype, config.quantization, loads_on(config, device)
    pieces = Pieces.of(*what, kernel) if load is load_base and is_fsdp(config) else None
    model = pieces.model if pieces else load(*what, kernel=kernel, unquantized=target_names(config.adapter))
    torch.manual_seed(config.seed)  # the same new adapter on every rank
    if config.method == "lora":
        model = add_adapter(model, config.adapter)
    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    prepare_layers(model, config)
    shard_model(model, config, device, pieces.fill if pieces else None)
    if isinstance(config, SftConfig) and config.packing:
        check_packing(model, min(2, config.micro_batch_size or config.batch_size // config.workers))
    objective = _objective(config, device)
    optimizer = optimizer_of(model, config)
    history, sampler = History(), None
    if isinstance(events, WorkerEvents):
        history = events.resume(model, optimizer)
        sampler = Sampler(
            tokenizer, [prompt for prompt, _ in questions], [answer for _, answer in questions],
            events.folder / SAMPLES, config.sample_every, config.sample_tokens,
            positions_of(config.base) if config.sample_every else None,
        )  # fmt: skip
    start, storage = history.step, sharded_bytes(model)

    history = train(
        model,
        rows if isinstance(rows, StreamedBatches) else batches_of(rows, config),
        config,
        validation=Pairs(validation) if isinstance(config, DpoConfig) else validation,
        events=events,
        optimizer=optimizer,
        objective=objective,
        history=history,
        sampler=sampler,
    )
    if history.stopped_early and isinstance(events, WorkerEvents):
        events.load_best(model)
    state = full_state(model)  # collective: every rank gathers, rank 0 writes
    if rank == 0:
        save_adapter(model, state, result)
        tokenizer.save_pretrained(str(result))
        (result / "history.json").write_text(json.dumps({"train": history.train, "validation": history.validation}))
    return FineTuned(history, storage, trained, start)


def _objective(config: SftConfig | DpoConfig, device: torch.device) -> Objective | None:
    """What is minimised; None for the loss on the next token."""
    if isinstance(config, DpoConfig):
        return PreferenceLoss(config.beta, config.loss, config.label_smoothing, config.sft_weight, config.loss_chunk)
    distilled = distillation(config, device)
    if config.packing and distilled is not None:
        check_packing(distilled.teacher, 1)
    return distilled


def export_adapter(model: Any) -> Export:
    """What writes the adapter of ``model`` as it is now, while training goes on. Collective."""
    state = {name: weight.clone() for name, weight in full_state(model).items()}
    return lambda folder: save_adapter(model, state, folder)
