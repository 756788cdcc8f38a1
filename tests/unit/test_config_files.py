"""Every YAML under configs/ is a valid config of the command that its first line names."""

import re
import shlex
from pathlib import Path

import pytest

from workbench.cli import GROUPS
from workbench.commands import parse_arguments
from workbench.config import CHECKOUT, load

FILES = sorted(file.relative_to(CHECKOUT) for file in (CHECKOUT / "configs").rglob("*.y*ml"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_shipped_config_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    first = file.read_text().splitlines()[0]
    assert first.startswith("# workbench "), "the first line names the command: # workbench GROUP COMMAND FILE"
    group, name, *arguments = shlex.split(first.removeprefix("# workbench "))
    command = GROUPS[group][1][name]
    given, overrides = parse_arguments(command, arguments)
    assert given == file
    load(command.schema(), given, overrides, visit_paths=False)  # its inputs are made by the commands before it


@pytest.mark.parametrize("page", [CHECKOUT / "README.md", *CHECKOUT.glob("docs/*.md"), CHECKOUT / "workbench/cli.py"])
def test_every_config_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(?<![\w/])configs/[\w/.-]+\.ya?ml", page.read_text())
    assert not [name for name in named if not (CHECKOUT / name).is_file()]


def test_there_are_configs() -> None:
    assert FILES
