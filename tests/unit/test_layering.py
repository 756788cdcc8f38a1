"""The house rules that a parser can check: imports point downward, and the environment is read in two places."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.config import CHECKOUT

MAY_IMPORT: dict[str, set[str]] = {
    "workbench": set(),
    "cluster": {"workbench"},
    "profiling": {"workbench", "cluster"},
    "data_pipelines": {"workbench", "cluster", "profiling"},
    "workloads": {"workbench", "cluster", "profiling"},
    "serve": {"workbench", "cluster", "profiling", "data_pipelines"},
    "tune": {"workbench", "cluster", "profiling", "data_pipelines", "workloads"},
    "benchmarks": {"workbench", "cluster", "profiling", "data_pipelines", "workloads", "serve", "tune"},
}
COMPOSITION_ROOT = Path("workbench/cli.py")
READS_ENVIRONMENT = {Path("workbench/config.py"), Path("workbench/session.py")}

MODULES = sorted(file.relative_to(CHECKOUT) for package in MAY_IMPORT for file in (CHECKOUT / package).rglob("*.py"))


def parse(module: Path) -> ast.Module:
    return ast.parse((CHECKOUT / module).read_text(), str(module))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top package of every import, also those inside functions and those by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value.split(".")[0]


def reads_of_the_environment(tree: ast.Module) -> Iterator[int]:
    """Lines that name ``os.environ`` or ``os.getenv``, however they were imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.environb"}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in {"environ", "getenv"})


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downward(module: Path) -> None:
    if module == COMPOSITION_ROOT:
        return
    package = module.parts[0]
    upward = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    wrong = [f"{module}:{line} imports {name}" for line, name in imports(parse(module)) if name in upward]
    assert not wrong


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_environment_is_read_in_two_modules_only(module: Path) -> None:
    if module in READS_ENVIRONMENT or module.parts[0] == "benchmarks":  # which start other programs with theirs
        return
    assert not [f"{module}:{line}" for line in reads_of_the_environment(parse(module))]


def test_the_checks_see_what_they_look_for() -> None:
    lazy = ast.parse("def f():\n    from serve.up import run\n    importlib.import_module('tune.sweep')\n")
    assert list(imports(lazy)) == [(2, "serve"), (3, "tune")]
    reads = ast.parse("import os\nfrom os import getenv\nx = os.environ['A']\n")
    assert sorted(reads_of_the_environment(reads)) == [2, 3]
    assert len(MODULES) > 20
