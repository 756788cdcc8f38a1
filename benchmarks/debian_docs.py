"""Real text without a model hub: passages of the documentation packages of Debian 12.

Packages are fetched by ``apt-get download`` and unpacked by ``dpkg-deb``, neither of which installs anything. Files are
taken in the order of a hash of their paths, so that any number of passages is a mixture of all packages and a smaller
corpus is the beginning of a larger one.
"""

import gzip
import hashlib
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.parsers import Unreadable, html_text
from workbench.errors import UserError

PACKAGES = (
    "ada-reference-manual-2020", "apache2-doc", "bible-kjv-text", "cppreference-doc-en-html", "debian-handbook",
    "debian-policy", "debian-reference-en", "dict-foldoc", "dict-gcide", "erlang-doc", "git-doc", "glibc-doc",
    "gnome-devel-docs", "libboost1.81-doc", "libglib2.0-doc", "libgtk-3-doc", "libreoffice-help-en-us", "lilypond-doc",
    "linux-doc-6.1", "manpages", "manpages-dev", "octave-doc", "openjdk-17-doc", "perl-doc", "postgresql-doc-15",
    "python-django-doc", "python-pandas-doc", "python-scipy-doc", "python-sqlalchemy-doc", "python-sympy-doc",
    "python3.11-doc", "qtbase5-doc-html", "racket-doc", "rust-doc", "sqlite3-doc", "vim-doc", "wordnet-base",
)  # fmt: skip
NON_FREE = ("doc-rfc-std", "doc-rfc-informational", "doc-rfc-experimental")
"""Taken only where the machine's own package sources offer them."""

SHORTEST, LONGEST = 400, 800
"""Characters of a passage."""
MOST_OF_A_FILE = 30_000
"""Passages of one file, of which a dictionary would make sixty thousand."""
AHEAD = 2048
"""Files that are read before the passages of the first of them are taken."""
TWICE = ("/_sources/", "/Documentation/", "/core/arch/")
"""Folders that say what the pages beside them say, or say the same thousands of times over."""
ENDINGS = (".html", ".htm", ".txt", ".rst", ".pod", ".dict.dz")
MANUAL = re.compile(r".*\.[1-8][a-z]*")
SENTENCE_END = re.compile(r"[.!?][\"')]?(?=\s)")
MACRO = re.compile(r"^[.'](?:\\\"|[A-Za-z]{1,3}\b) ?")
FONT = re.compile(r"\\f(?:\[[^]]*\]|.)|\\s[+-]?\d|\\[&/,|^]")


class Passage(NamedTuple):
    """A piece of a file."""

    title: str
    source: str
    text: str


def download(cache: Path) -> tuple[Path, list[str]]:
    """(the folder with a folder of files for each package, the names and versions); what is there is not fetched again.

    Raises UserError where apt is missing or does not offer a package.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(
                f"{tool} is missing: the corpus is made of Debian packages, so build it on Debian or Ubuntu"
            )
    archives, unpacked = cache / "archives", cache / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    wanted = [*PACKAGES, *(name for name in NON_FREE if _offered(name))]
    if missing := [name for name in wanted if not list(archives.glob(f"{name}_*.deb"))]:
        if lacking := [name for name in missing if not _offered(name)]:
            raise UserError(f"apt offers no package {lacking[0]}: run apt-get update, or use Debian 12")
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=archives, check=True, stdout=sys.stderr)
    versions = []
    for name in wanted:
        archive = sorted(archives.glob(f"{name}_*.deb"))[-1]
        versions.append(" ".join(archive.stem.split("_")[:2]).replace("%3a", ":"))
        if not (unpacked / name).is_dir():
            partial = unpacked / f".{name}"
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
            partial.rename(unpacked / name)
    return unpacked, versions


def _offered(package: str) -> bool:
    shown = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
    return shown.returncode == 0 and bool(shown.stdout)


def read(folder: Path, processes: int = 2) -> Iterator[Passage]:
    """The passages of all files below ``folder``, always in the same order."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = [str(path.relative_to(folder)) for path in files if kind_of(str(path))]
    names.sort(key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for first in range(0, len(names), AHEAD):  # no further ahead of the reader than this
            for passages in pool.imap(_passages, [(folder, name) for name in names[first : first + AHEAD]], 16):
                yield from passages


def kind_of(path: str) -> str:
    """How a file is read: html, man, wordnet or text; empty where it is not."""
    if any(part in path for part in TWICE):
        return ""
    name = path.rpartition("/")[2].removesuffix(".gz")
    if "/man/" in path:
        return "man" if MANUAL.fullmatch(name) else ""
    if "/wordnet/data." in path:
        return "wordnet"
    if name.endswith(ENDINGS) or name.startswith(("changelog", "ChangeLog")):
        return "html" if name.endswith((".html", ".htm")) else "text"
    return ""


def _passages(place: tuple[Path, str]) -> list[Passage]:
    folder, name = place
    content = (folder / name).read_bytes()
    if name.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    title, text = text_of(content, kind_of(name))
    title = title or name.rpartition("/")[2]
    return [Passage(title, name, passage) for passage in split(text)[:MOST_OF_A_FILE]]


def text_of(content: bytes, kind: str) -> tuple[str, str]:
    """(title, text) of a file; both are empty where it cannot be decoded."""
    if kind == "html":
        try:
            return html_text(content)
        except Unreadable:
            return "", ""
    text = content.decode("utf-8", "replace")
    if kind == "wordnet":
        return "", "\n".join(_gloss(line) for line in text.splitlines() if " | " in line)
    return "", manual_text(text) if kind == "man" else text


def _gloss(line: str) -> str:
    """``dwarf: a plant or animal that is atypically small`` of a line of WordNet's data files (see wndb(5))."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    return f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"


def manual_text(source: str) -> str:
    """The words of a manual page without its macros."""
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".so", "..")):
            continue
        lines.append(FONT.sub("", MACRO.sub("", line)).replace("\\-", "-").replace("\\e", "\\").replace('"', ""))
    return "\n".join(lines)


def split(text: str) -> list[str]:
    """Passages of 400 to 800 characters, of whole lines where possible, else cut at the end of a sentence or a word;
    a shorter rest is left out."""
    passages = []
    start = 0
    while len(text) - start >= SHORTEST:
        if text[start].isspace():
            start += 1
            continue
        end = _end(text, start)
        passage = text[start:end].rstrip()
        if len(passage) >= SHORTEST:
            passages.append(passage)
        start = end
    return passages


def _end(text: str, start: int) -> int:
    """Where the passage from ``start`` on ends."""
    first, last = start + SHORTEST, start + LONGEST
    if last >= len(text):
        return len(text)
    for mark in ("\n\n", "\n"):
        if (at := text.rfind(mark, first, last)) >= 0:
            return at
    ends = [match.end() for match in SENTENCE_END.finditer(text, first, last)]
    if ends:
        return ends[-1]
    at = text.rfind(" ", first, last)
    return at if at >= 0 else last
