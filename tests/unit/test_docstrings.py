"""Docstrings are read from source by ``ast``, with names, lines and reasons."""

import ast
from pathlib import Path

from data_pipelines.docstrings import Module, docstrings, installed_modules
from data_pipelines.sources import Row, read_blocks, split_evenly

CODE = '''"""The module."""

class Door:
    """A door.

        It opens.
    """

    def open(self):
        "Open it."

    async def close(self): """Close it."""

    silent = 1

try:
    def made(): """Made in try."""
except ImportError:
    def made(): """Made in except."""

def outer():
    """Outer."""
    def inner():
        """Nobody reads this."""

def number(): 1
def formatted(): f"""not {1} docstring"""
'''


def write(folder: Path, path: str, content: bytes) -> Module:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return Module("pkg", "1.0", str(folder), path, len(content))


def install(site: Path, package: str, version: str, files: dict[str, bytes]) -> None:
    """Lay ``files`` down as pip does, with a RECORD."""
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = []
    for path, content in files.items():
        write(site, path, content)
        lines.append(f"{path},sha256=x,{len(content)}\n")
    (info / "RECORD").write_text("".join(lines))


def test_names_lines_and_clean_texts() -> None:
    assert list(docstrings(ast.parse(CODE))) == [
        ("", 1, "The module."),
        ("Door", 4, "A door.\n\nIt opens."),
        ("Door.open", 10, "Open it."),
        ("Door.close", 12, "Close it."),
        ("made", 17, "Made in try."),
        ("made", 19, "Made in except."),
        ("outer", 22, "Outer."),
    ]


def test_texts_are_those_of_ast() -> None:
    tree = ast.parse(CODE)
    door = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    expected = [ast.get_docstring(node) for node in (tree, door)]
    assert [text for _, _, text in docstrings(tree)][:2] == expected


def test_a_row_names_its_place_without_the_environment(tmp_path: Path) -> None:
    module = write(tmp_path, "pkg/sub/__init__.py", b'"""Sub."""\n')
    assert list(module.rows()) == [Row("pkg.sub", "Sub.", "pkg 1.0 pkg/sub/__init__.py:1")]


def test_what_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    reasons = {}
    for name, content in {
        "syntax": b"def (:\n",
        "codec": b'"""\xff\xfe"""\n',
        "declared": b"# -*- coding: nonsense -*-\n",
        "null": b"x = 1\x00\n",
    }.items():
        [reasons[name]] = [row.reason for row in write(tmp_path, f"{name}.py", content).rows()]
    gone = Module("pkg", "1.0", str(tmp_path), "gone.py", 0)
    [reasons["gone"]] = [row.reason for row in gone.rows()]
    assert reasons["syntax"] == "syntax error"
    assert reasons["codec"] == reasons["declared"] == "undecodable file"
    assert reasons["null"].startswith(("unreadable file", "syntax error"))
    assert reasons["gone"] == "unreadable file (FileNotFoundError)"


def test_installed_modules_follow_records_not_folders(tmp_path: Path) -> None:
    install(
        tmp_path,
        "My_Package",
        "2.0",
        {"mine/b.py": b"", "mine/a.py": b"", "mine/tests/test_a.py": b"", "../../bin/tool.py": b"", "mine/x.so": b""},
    )
    install(tmp_path, "abc", "1", {"abc.py": b"", "__editable___abc_finder.py": b""})
    (tmp_path / "loose.py").write_text('"""Not installed by anyone."""')
    modules = installed_modules([tmp_path])
    assert [(m.package, m.version, m.path) for m in modules] == [
        ("abc", "1", "abc.py"),
        ("my-package", "2.0", "mine/a.py"),
        ("my-package", "2.0", "mine/b.py"),
    ]


def test_groups_cover_everything_once_and_in_order(tmp_path: Path) -> None:
    modules = [Module("p", "1", "", f"{i}.py", size) for i, size in enumerate([5, 500, 0, 40, 40, 40, 1, 1])]
    for groups in (1, 3, 20):
        split = split_evenly(modules, groups)
        assert [m for group in split for m in group] == modules
        assert len(split) <= groups
        assert all(split)


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    [table] = read_blocks([write(tmp_path, "s.py", b'"""Half \\ud800."""')])
    assert table["text"].to_pylist() == ["Half ?."]
