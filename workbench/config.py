"""YAML files and dotted overrides become a checked pydantic model; every error says where and what to type.

    config = load(EmbedConfig, Path("configs/embed.yaml"), ["batch_size=64", "index.kind=FLAT"])

This module and ``session.py`` are the only two that read environment variables.
"""

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from workbench.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]

RUNS_ROOT_VARIABLE = "WORKBENCH_RUNS_ROOT"
COMMIT_VARIABLE = "WORKBENCH_GIT_COMMIT"
CLEAN_VARIABLE = "WORKBENCH_GIT_CLEAN"
SSH_OPTIONS_VARIABLE = "WORKBENCH_SSH_OPTIONS"


def runs_root() -> Path:
    """The absolute folder that holds every run: ``$WORKBENCH_RUNS_ROOT``, or ``runs/`` in this checkout.

    Raises UserError if the variable names a relative path, because a job's working directory is thrown away.
    """
    given = os.environ.get(RUNS_ROOT_VARIABLE)
    if not given:
        return CHECKOUT / "runs"
    if not Path(given).is_absolute():
        raise UserError(f"{RUNS_ROOT_VARIABLE}={given} is relative: give an absolute path")
    return Path(given)


def environment(name: str) -> str | None:
    """The environment variable ``name``, or None where it is unset or empty."""
    return os.environ.get(name) or None


def inherited_environment() -> dict[str, str]:
    """A copy of the whole environment, for a child process."""
    return dict(os.environ)


def default_environment(name: str, value: str) -> None:
    """Set the environment variable ``name``, for libraries that read it, unless the user has."""
    os.environ.setdefault(name, value)


def adopt_environment(variables: dict[str, str]) -> None:
    """Set environment variables of this process, for libraries that are yet to read them."""
    os.environ.update(variables)


def submitted_commit() -> tuple[str, bool] | None:
    """The git commit and cleanness that ``workbench submit`` passed to this job, or None outside one."""
    commit = os.environ.get(COMMIT_VARIABLE)
    return (commit, os.environ.get(CLEAN_VARIABLE) == "1") if commit else None


def ssh_options() -> list[str]:
    """Further arguments of every ssh: ``$WORKBENCH_SSH_OPTIONS``, split as a shell would, for example
    ``-F lab/ssh_config``. Raises UserError for a quote that is not closed."""
    given = os.environ.get(SSH_OPTIONS_VARIABLE, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise UserError(f"{SSH_OPTIONS_VARIABLE}={given}: {error}") from None


class Config(BaseModel):
    """Base of every command's config: unknown keys are refused, defaults are checked, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, frozen=True, protected_namespaces=(), defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``yes`` and ``on`` as true, and Python takes true for 1."""
        given = value if isinstance(value, list) else [value]
        if any(isinstance(each, bool) for each in given):
            types = _types_in(cls.model_fields[str(info.field_name)].annotation)
            if (int in types or float in types) and bool not in types and Any not in types:
                raise ValueError("give a number: YAML reads yes, no, on, off, true and false as truth values")
        return value


def resolve_path(path: Path) -> Path:
    """An absolute path: ``runs/...`` is under the runs root, ``runs/GROUP-COMMAND/latest/...`` its newest
    finished run, anything else is relative to the current folder. Need not exist."""
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user's home") from None
    if path.is_absolute():
        return path
    if path.parts[:1] != ("runs",):
        return Path.cwd() / path
    resolved = runs_root().joinpath(*path.parts[1:])
    if len(path.parts) > 2 and path.parts[2] == "latest":
        from workbench.runs import latest  # runs.py builds on this module

        resolved = latest(path.parts[1]).joinpath(*path.parts[3:])
    return resolved


def _given(path: Any) -> Any:
    if isinstance(path, str) and not path.strip():
        raise ValueError("an empty path: give one, or '.' for the current folder")
    return path


def _existing(path: Path, info: ValidationInfo) -> Path:
    if info.context is UNVISITED:
        return path
    try:
        resolved = resolve_path(path)
    except UserError as error:
        raise ValueError(str(error)) from error
    try:
        if resolved.exists():
            return resolved
    except PermissionError as error:
        raise ValueError(f"may not look at {resolved}: {error.strerror}") from None
    parent = resolved.parent
    while not parent.exists():
        parent = parent.parent
    near = difflib.get_close_matches(resolved.name, os.listdir(parent) if parent.is_dir() else [], 1)
    hint = f"; did you mean {parent / near[0]}?" if near else f"; {parent} exists"
    raise ValueError(f"no such file or folder: {resolved}{hint}")


UNVISITED = {"paths": "unvisited"}
"""Validation context in which an ``InputPath`` is taken as written, for configs whose inputs are yet to be made."""

InputPath = Annotated[Path, BeforeValidator(_given), AfterValidator(_existing)]
"""A path that must exist when the config is read; resolved by ``resolve_path``."""

OutputPath = Annotated[Path, BeforeValidator(_given), AfterValidator(resolve_path)]
"""A path that the command will make; resolved by ``resolve_path``."""

C = TypeVar("C", bound=Config)


def load(schema: type[C], file: Path | None = None, overrides: Sequence[str] = (), *, visit_paths: bool = True) -> C:
    """Build ``schema`` from a YAML file and ``dotted.key=value`` overrides (values are YAML), the latter winning.

    Without ``visit_paths`` input paths need not exist.
    Raises UserError with the file and line, or the override, and the nearest valid key.
    """
    data: dict[str, Any] = {}
    places: dict[str, str] = {}
    if file is not None:
        data, lines = _read_yaml(file)
        places = {key: f"{file}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, value = _parse_override(override)
        _assign(data, key, value, override)
        places[key] = f"override '{override}'"
    try:
        return schema.model_validate(data, context=None if visit_paths else UNVISITED)
    except ValidationError as error:
        origin = str(file) if file else "the command line"
        raise UserError("\n".join(_explain(schema, e, places, origin) for e in error.errors())) from None


def dump(config: BaseModel | dict[str, Any]) -> str:
    """The config as YAML with every default resolved, in the order of its fields."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``1e-4`` is a number, as in YAML 1.2, and not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, siblings, 1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise UserError(f"no such config file: {file}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {file}: {error}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
        lines: dict[str, int] = {}
        _collect_lines(node, "", lines, file)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise UserError(f"{file}:1: a config is a mapping of keys to values, this is a {type(data).__name__}")
    return data, lines


def _collect_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if path in lines:
                raise UserError(f"{file}:{line}: key '{path}' is given twice (first on line {lines[path]})")
            lines[path] = line
            _collect_lines(value, f"{path}.", lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _collect_lines(item, f"{prefix}{index}.", lines, file)


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"'{override}' is not an override: write key=value, for example batch_size=64")
    try:
        return key.strip(), yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override '{override}': the value is not valid YAML: {error}") from None


def read_value(text: str) -> Any:
    """The value that ``text`` is as YAML, read as a config's are. Raises ValueError for what is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _assign(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    level: Any = data
    for parent in parents:
        place = _index(level, parent, override) if isinstance(level, list) else parent
        if isinstance(level, dict) and level.get(parent) is None:
            level[parent] = {}  # absent, or null in the file
        level = level[place]
        if not isinstance(level, dict | list):
            raise UserError(f"override '{override}': '{parent}' holds a value, not a group of keys")
    if isinstance(level, list):
        level[_index(level, last, override)] = value
    else:
        level[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise UserError(f"override '{override}': '{part}' is no place in a list of {len(items)}; count from 0")


def _explain(schema: type[BaseModel], error: Any, places: dict[str, str], origin: str) -> str:
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    around = [places[".".join(location[:n])] for n in range(len(location), 0, -1) if ".".join(location[:n]) in places]
    below = [place for key, place in places.items() if path and key.startswith(f"{path}.")]
    where = next(iter(around + below), origin)
    if error["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else f"valid keys: {', '.join(known)}"
        return f"{where}: unknown key '{path}'; {hint}"
    if error["type"] == "missing":
        return f"{where}: key '{path}' is required; give it in the file or as {path}=VALUE"
    if error["type"] == "list_type" and isinstance(error["input"], dict):
        return f"{where}: '{path}' is a list that the file does not give: write the whole of it, as {path}=[...]"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = f" (given: {error['input']!r})" if path and not isinstance(error["input"], dict) else ""
    return f"{where}: {path + ': ' if path else ''}{message}{given}"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        field = schema.model_fields.get(part)
        if field is None:
            continue  # a list index or a union tag
        models = [t for t in _types_in(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return []
        schema = models[0]
    return list(schema.model_fields)


def _types_in(annotation: Any) -> list[Any]:
    return [annotation, *(t for argument in get_args(annotation) for t in _types_in(argument))]
