"""Documentation strings of the installed Python packages: real technical text that every machine has.

Modules are parsed, never imported. A document's source is ``package version path:line`` relative to the site-packages
folder, so it does not change with the place of the environment.
"""

import ast
import csv
import gc
import inspect
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.sources import Row

SKIPPED_FOLDERS = frozenset({"test", "tests", "_vendor", "vendor", "_vendored", "thirdparty_files"})
"""Folder names that hold tests or copies of other packages."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One installed Python file: its distribution, and where it lies under ``root``; ``size`` is in bytes."""

    package: str
    version: str
    root: str
    path: str
    size: int

    @property
    def name(self) -> str:
        """The dotted module name, a package's own for its ``__init__``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def rows(self) -> Iterator[Row]:
        """One row per docstring, or one row with the reason why the module has none to give."""
        where = f"{self.package} {self.version} {self.path}"
        # The parser makes millions of short-lived nodes: collecting garbage between them costs a fifth of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            content = Path(self.root, self.path).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(content)
            found = list(docstrings(tree))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Row(self.name, "", where, _reason(error))
            return
        finally:
            if collecting:
                gc.enable()
        for name, line, text in found:
            yield Row(f"{self.name}.{name}" if name else self.name, text, f"{where}:{line}")


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return "undecodable file" if "codec" in str(error) or "encoding" in str(error) else "syntax error"
    return f"unreadable file ({type(error).__name__})"


def site_packages() -> list[Path]:
    """The folders that hold this environment's installed packages."""
    return sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})


def installed_modules(roots: Sequence[Path]) -> list[Module]:
    """Every module that an installed wheel recorded, in an order that depends on names alone.

    Each distribution's RECORD names its files, so loose files and editable checkouts (this project's own, for one)
    are left out.
    """
    modules = {}
    for root in roots:
        for record in sorted(root.glob("*.dist-info/RECORD")):
            name, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
            package = normal_name(name)
            with record.open(newline="", encoding="utf-8") as lines:
                for path, _, size in csv.reader(lines):
                    parts = path.split("/")
                    wanted = path.endswith(".py") and not path.startswith("__editable__")
                    if wanted and ".." not in parts and not SKIPPED_FOLDERS.intersection(parts):
                        modules[package, path] = Module(package, version, str(root), path, int(size or 0))
    return [modules[key] for key in sorted(modules)]


def normal_name(package: str) -> str:
    """A distribution's name as PyPI compares it (PEP 503)."""
    return package.lower().replace("_", "-").replace(".", "-")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """(qualified name, line, cleaned docstring) of the module, its classes and their functions, in file order.

    Functions inside functions are private to them and are left out.
    """
    yield from _own(tree, "")
    yield from _walk(tree.body, "")


def _walk(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, int, str]]:
    for node in body:
        if isinstance(node, Definition):
            name = f"{prefix}{node.name}"
            yield from _own(node, name)
            if isinstance(node, ast.ClassDef):
                yield from _walk(node.body, f"{name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for block in (node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                yield from _walk(block, prefix)
            for handler in getattr(node, "handlers", []):
                yield from _walk(handler.body, prefix)


def _own(node: ast.Module | Definition, name: str) -> Iterator[tuple[str, int, str]]:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield name, first.lineno, inspect.cleandoc(first.value.value)
