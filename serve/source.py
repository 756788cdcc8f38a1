"""What a model to serve may be named by: a folder, a run folder of ours, a GGUF file, or a name on the hub."""

from pathlib import Path

from pydantic import ValidationInfo

from workbench.config import UNVISITED, resolve_path
from workbench.errors import UserError

OF_A_RUN = ("artifacts/merged", "artifacts/model", "artifacts/best/merged")
"""Where runs of ``train sft``, ``train pretrain`` and ``tune run`` leave a whole model."""
ADAPTERS_OF_A_RUN = ("artifacts/adapter", "artifacts/best/adapter")


def _path(value: str) -> Path | None:
    if not (value.startswith((".", "/", "~", "runs/")) or Path(value).exists()):
        return None
    try:
        return resolve_path(Path(value))
    except UserError as error:
        raise ValueError(str(error)) from error


def model_source(value: str, info: ValidationInfo) -> str:
    """An absolute path where the text looks like one or names one, of a run the model that it left; else a hub name,
    unchanged. Raises ValueError where there is no model."""
    if info.context is UNVISITED or (path := _path(value)) is None:
        return value
    if path.suffix == ".gguf" and path.is_file():
        return str(path)
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    for folder in (path, *(path / name for name in OF_A_RUN)):
        if (folder / "config.json").is_file():
            return str(folder)
    for folder in (path, *(path / name for name in ADAPTERS_OF_A_RUN)):
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is an adapter: give its base as source, and adapters: {{NAME: {value}}}")
    raise ValueError(f"no model there: {path / 'config.json'} does not exist")


def adapter_source(value: str, info: ValidationInfo) -> str:
    """The absolute path of a LoRA adapter: its folder, or a run that left one. Raises ValueError where none is."""
    if info.context is UNVISITED:
        return value
    path = _path(value) or Path.cwd() / value
    for folder in (path, *(path / name for name in ADAPTERS_OF_A_RUN)):
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    raise ValueError(f"no adapter there: {path / 'adapter_config.json'} does not exist")
