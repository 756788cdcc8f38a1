"""What a training config may name: a model by folder or hub name, and data by "chemistry" or by JSONL files."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, PlainValidator, Tag, TypeAdapter, ValidationInfo

from workbench.config import UNVISITED, InputPath, resolve_path
from workbench.errors import UserError


def _model(value: str, info: ValidationInfo) -> str:
    if info.context is UNVISITED or not (value.startswith((".", "/", "~", "runs/")) or Path(value).exists()):
        return value
    try:
        folder = resolve_path(Path(value))
    except UserError as error:
        raise ValueError(str(error)) from error
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"no model there: {folder} has neither config.json nor adapter_config.json")
    return str(folder)


ModelSource = Annotated[str, AfterValidator(_model)]
"""A model: a folder that must exist where the text looks like a path, else a hub name, left as it is."""


def check_model(key: str, source: str) -> None:
    """Raise UserError where ``source`` is neither a folder nor a model that the hub, or its cache, gives."""
    if Path(source).is_dir():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=10)  # once; a download tries for 23 s
        from transformers import AutoConfig

        AutoConfig.from_pretrained(source)
    except Exception as error:  # no network, no such model, no access: all are the same mistake to the user
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: '{source}' is not a folder and the hub did not give it: {reason}") from None


def _template(value: str, info: ValidationInfo) -> str:
    if info.context is UNVISITED or not (value.startswith((".", "/", "~", "runs/")) or value.endswith(".jinja")):
        return value
    try:
        file = resolve_path(Path(value))
    except UserError as error:
        raise ValueError(str(error)) from error
    if not file.is_file():
        raise ValueError(f"no such template: {file}")
    return str(file)


TemplateSource = Annotated[str, AfterValidator(_template)]
"""A chat template: a Jinja file that must exist where the text looks like a path, else a name."""


CHEMISTRY: Literal["chemistry"] = "chemistry"
HUB = "hf:"

_A_PATH: TypeAdapter[Path] = TypeAdapter(InputPath)


def _file_or_set(value: Any, info: ValidationInfo) -> Path:
    if value in (HUB, {HUB[:-1]: None}):  # the second is what YAML makes of it
        raise ValueError(f"name a data set after {HUB}, as in {HUB}NAME or {HUB}NAME:SPLIT")
    return Path(value) if str(value).startswith(HUB) else _A_PATH.validate_python(value, context=info.context)


def _files(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) and value != CHEMISTRY else value


def _chemistry_or_files(value: str | list[Path]) -> str | list[Path]:
    if isinstance(value, list) and not value:
        raise ValueError("name at least one file, or chemistry")
    return value


FileOrSet = Annotated[Path, PlainValidator(_file_or_set)]
"""A file or folder that must exist, or ``hf:`` and a data set of the hub, as it is written."""

DataSource = Annotated[
    Annotated[Literal["chemistry"], Tag("name")] | Annotated[list[FileOrSet], Tag("files")],
    Discriminator(lambda value: "name" if value == CHEMISTRY else "files"),  # so that errors speak of one of them
    BeforeValidator(_files),
    AfterValidator(_chemistry_or_files),
]
"""Rows to learn from: ``chemistry``, or files, folders and data sets of the hub that ``conversations.py`` reads."""
