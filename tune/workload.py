"""The train commands that a sweep can run, and what a trial of each does in its own process."""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.runs import Run
from workloads.dpo import DpoConfig
from workloads.pretrain import PretrainConfig
from workloads.sft import SftConfig
from workloads.training.config import TrainingConfig

if TYPE_CHECKING:
    import torch

    from tune.kept_base import KeptBase
    from workloads.training.ray_train import WorkerEvents

Payload = dict[str, Any]
"""What all trials share of the data: files of rows by part, and facts for the report."""


@dataclass(frozen=True)
class Workload:
    """A command of ``workbench train``.

    ``shared`` names keys that no trial may vary, because the rows are made once for all; ``prepare`` makes them;
    ``train`` runs one trial, or the part of one rank of it, on a device, and writes its result, an adapter or a model,
    to a folder; a base that it does not alter stays loaded in ``KeptBase``. ``keep`` makes of a trial's result what the
    command itself would have left, below a folder.
    """

    schema: type[TrainingConfig]
    module: str
    shared: frozenset[str]
    prepare: Callable[[Any, Run], Payload]
    train: Callable[[Any, Payload, "WorkerEvents", Path, "KeptBase", "torch.device", int], dict[str, Any]]
    keep: Callable[[Any, Path, Path], None]

    def check(self, config: TrainingConfig) -> None:
        """Raise UserError for what the command itself would refuse."""
        importlib.import_module(self.module).check(config)


def _prepare_tuning(config: SftConfig | DpoConfig, run: Run) -> Payload:
    from workloads.prepared import prepare
    from workloads.tokenized import cache_folder

    made = prepare(config, run)
    files = {part: str(run.artifact(f"{part}.jsonl")) for part in ("train", "validation")}
    return {**files, "facts": made.facts, "cache": str(cache_folder())}


def _tune(
    config: SftConfig | DpoConfig, payload: Payload, events: "WorkerEvents", result: Path, base: "KeptBase",
    device: "torch.device", rank: int,
) -> dict[str, Any]:  # fmt: skip
    from workloads.fine_tune import fine_tune
    from workloads.prepared import recipe_of
    from workloads.tokenized import TokenRows, tokenize
    from workloads.training.adapters import load_base

    rows, validation = (  # there already, unless the space varies how rows are made
        TokenRows(tokenize(Path(payload[part]), recipe_of(config), Path(payload["cache"])))
        for part in ("train", "validation")
    )
    alters = config.method == "full" or config.compile or config.workers > 1
    if alters:
        base.drop()
    done = fine_tune(
        config, rows, validation, device=device, events=events, result=result, rank=rank,
        load=load_base if alters else base,
    )  # fmt: skip
    return {"trained_parameters": done.trained_parameters, "resumed_from": done.resumed_from}


def _keep_tuned(config: SftConfig | DpoConfig, result: Path, folder: Path) -> None:
    from workloads.chat_templates import end_generation
    from workloads.sft import keep_split_seed, write_merged

    if config.method == "lora":
        shutil.copytree(result, folder / "adapter")
        write_merged(config.base, folder / "adapter", folder / "merged", config.compute_dtype)
    else:
        shutil.copytree(result, folder / "merged")
        end_generation(folder / "merged")
        keep_split_seed(config.base, folder / "merged")


def _prepare_corpus(config: PretrainConfig, run: Run) -> Payload:
    from workloads.pretraining import build_corpus

    tokenizer = run.artifact("tokenizer")
    corpus = build_corpus(config, run, tokenizer)
    return {**corpus["files"], "result": str(tokenizer), "facts": corpus["facts"]}


def _pretrain(
    config: PretrainConfig, payload: Payload, events: "WorkerEvents", result: Path, base: "KeptBase",
    device: "torch.device", rank: int,
) -> dict[str, Any]:  # fmt: skip
    from workloads.pretraining import pretrain

    done = pretrain(config, payload, device=device, events=events, result=result, rank=rank)
    return {"trained_parameters": done["parameters"], "resumed_from": done["resumed_from"]}


def _keep_model(config: PretrainConfig, result: Path, folder: Path) -> None:
    from workbench.files import write_json
    from workloads.instructions import SPLIT_FILE

    shutil.copytree(result, folder / "model")
    write_json(folder / "model" / SPLIT_FILE, {"split_seed": config.split_seed})


OF_ROWS = frozenset({"data", "split_seed", "validation_rows", "resume"})
OF_A_CORPUS = frozenset(
    {"documents", "document_share", "split_seed", "vocabulary", "max_length", "chemistry_copies", "randomised"}
) | {"distill", "resume"}

OF_A_CHECKPOINT = frozenset({"base", "method", "quantization", "adapter.rank", "adapter.targets", "model", "steps"})
"""Keys that decide what a checkpoint holds, or how long training is: a trial that goes on from another's has them from
there."""

OF_A_PLACE = frozenset({"workers", "strategy", "resources", "cpus_per_worker", "gpus_per_worker"})
"""Keys that say where a trial runs, which are the same for all of a sweep."""

WORKLOADS = {
    "train sft": Workload(SftConfig, "workloads.sft", OF_ROWS, _prepare_tuning, _tune, _keep_tuned),
    "train dpo": Workload(DpoConfig, "workloads.dpo", OF_ROWS, _prepare_tuning, _tune, _keep_tuned),
    "train pretrain": Workload(
        PretrainConfig, "workloads.pretrain", OF_A_CORPUS, _prepare_corpus, _pretrain, _keep_model
    ),
}
