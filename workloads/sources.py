"""What a training config may name: a model by folder or hub name, and data by "chemistry" or by JSONL files."""

import json
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
        raise UserError(
            f"{key}: '{source}' is not a folder and the hub did not give it: {_first_line(error)}"
        ) from None


def read_config(key: str, source: str) -> Any:
    """Transformers' config of the model ``source``. Raises UserError where there is none that it can read."""
    check_model(key, source)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{key}: {source} holds an adapter: give the model that it was merged into")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{key}: Transformers cannot read {source}: {_first_line(error)}") from None


def read_tokenizer(key: str, source: str) -> Any:
    """The tokenizer of the model ``source``. Raises UserError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged file is whatever its parser raises, in Rust plain Exception
        raise UserError(
            f"{key}: the tokenizer of {source} cannot be read ({_first_line(error)}): it needs tokenizer.json and "
            "tokenizer_config.json, those of the model that it was made from"
        ) from None


WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_weights(key: str, source: str) -> None:
    """Raise UserError where ``source`` is a folder that lacks weight files, or some that its index names."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).is_file() for name in WEIGHTS):
        return
    for name in WEIGHTS:
        if (index := folder / f"{name}.index.json").is_file():
            try:
                files = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise UserError(f"{key}: {index} cannot be read ({_first_line(error)}): fetch it again") from None
            if lost := sorted(file for file in files if not (folder / file).is_file()):
                raise UserError(f"{key}: {source} lacks {len(lost)} of {len(files)} weight files: fetch {lost[0]}")
            return
    raise UserError(f"{key}: {source} has no weights: it needs model.safetensors, or its parts with their index")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
