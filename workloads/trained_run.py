"""The weights that a training run left: those of its end, or of a checkpoint where it was cut short."""

import socket
from dataclasses import dataclass
from pathlib import Path

from workbench.config import load
from workbench.errors import UserError
from workbench.files import fingerprint
from workbench.run_records import Record
from workbench.runs import resolve_run, state_of
from workloads.dpo import DpoConfig
from workloads.pretrain import PretrainConfig
from workloads.sft import SftConfig, TuningConfig
from workloads.sources import check_model
from workloads.training.config import DivergenceConfig

SCHEMAS: dict[str, type[SftConfig | DpoConfig | PretrainConfig]] = {
    "train sft": SftConfig,
    "train dpo": DpoConfig,
    "train pretrain": PretrainConfig,
}
"""The commands whose runs have weights."""


@dataclass(frozen=True)
class TrainedRun:
    """A run, its config, and where its weights are: ``checkpoint`` is a folder ``step-00000120``, or None for those of
    its end. ``base`` is the model that was tuned, where it lies now; empty for ``train pretrain``."""

    record: Record
    config: SftConfig | DpoConfig | PretrainConfig
    base: str
    checkpoint: Path | None

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter was trained, not all weights."""
        return isinstance(self.config, TuningConfig) and self.config.method == "lora"

    @property
    def quantized(self) -> bool:
        """Whether the base was in NF4."""
        return isinstance(self.config, TuningConfig) and self.config.quantization == "nf4"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        if self.checkpoint is not None:
            return self.checkpoint / "adapter"
        return self.record.folder / "artifacts" / "adapter"

    @property
    def model(self) -> Path:
        """The folder of the model whose weights were all trained; of a ``train pretrain`` that was cut short it has
        the tokenizer alone."""
        return self.record.folder / "artifacts" / ("merged" if isinstance(self.config, TuningConfig) else "model")

    @property
    def weights(self) -> Path:
        """The folder that the weights are in."""
        return self.checkpoint or (self.adapter if self.is_adapter else self.model)

    def refuse_changed_base(self) -> None:
        """Raise UserError where the base is another than the run was tuned from."""
        was = self.record.inputs.get("base", {}).get("sha256")
        if was and Path(self.base).is_dir() and fingerprint(Path(self.base)) != was:
            raise UserError(f"base: {self.base} is not what {self.record.id} was tuned from: its files have changed")


def find_trained(reference: str, step: int | None = None, base: str | None = None) -> TrainedRun:
    """The run ``reference`` with its last weights, or those of the checkpoint of ``step``.

    Of a run that was cut short they are those of the newest checkpoint that is from before its loss ran away.
    ``base`` says where the model that was tuned lies, if no longer where the run found it. Raises UserError where there
    are no such weights, or no such base.
    """
    from workloads.training.resume import CHECKPOINTS

    record = Record.read(resolve_run(reference))
    command = record.status.get("command", "")
    if command not in SCHEMAS:
        hint = "; the best trial is artifacts/best of it" if command == "tune run" else ""
        raise UserError(f"{record.id} is of '{command}': give a run of {', '.join(SCHEMAS)}{hint}")
    config = load(SCHEMAS[command], record.folder / "config.yaml", visit_paths=False)
    checkpoint = _checkpoint(record, record.folder / CHECKPOINTS, step, config.divergence)
    where = _base(record, config.base, base) if isinstance(config, TuningConfig) else ""
    run = TrainedRun(record, config, where, checkpoint)
    if not run.weights.is_dir():
        raise UserError(f"{record.id} has no weights any more: {run.weights} is gone; give step= of a checkpoint")
    return run


def _checkpoint(record: Record, folder: Path, step: int | None, rule: DivergenceConfig | None) -> Path | None:
    from workloads.training.checkpoint import complete, step_of
    from workloads.training.resume import sound

    state, found = state_of(record.folder), complete(folder)
    if state == "running" and record.status.get("host") == socket.gethostname():
        raise UserError(f"{record.id} is running: wait for its end, or stop it")
    if step is not None:
        steps = {step_of(path): path for path in found}
        if step not in steps:
            known = f"it has those of {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"{record.id} has no checkpoint of step {step}: {known}")
        return steps[step]
    if state == "finished":
        return None
    good = sound(found, rule)
    if not good:
        raise UserError(f"{record.id} did not finish ({state}), and has no {'good ' if found else ''}checkpoint")
    return good[-1]


def _base(record: Record, recorded: str, given: str | None) -> str:
    base = given or recorded
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"the base of {record.id} is gone: {base}; say where it lies now, with base=FOLDER")
    check_model("base", base)
    return base
