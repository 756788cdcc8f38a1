"""Where documents come from: the ``source`` of a config, opened.

source: installed-packages                      # their documentation strings
source: /data/pages                             # Parquet, JSON Lines, CSV, text, Markdown, HTML and PDF files
source: s3://bucket/pages?region=eu-central-1   # the same there
source: hf:rajpurkar/squad                      # a data set of the Hugging Face hub, or hf:/folder
source: postgresql+psycopg://reader@host/db     # any database of SQLAlchemy, with query: TABLE or SQL
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.config import Config, resolve_path, runs_root
from workbench.conversations import Form
from workbench.errors import UserError
from workbench.redact import redact

if TYPE_CHECKING:
    from data_pipelines.columns import Columns
    from data_pipelines.sources import Item

INSTALLED = "installed-packages"
FILE_URLS = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")


class Reading(Config):
    """A source of documents, and which of its columns hold what."""

    source: str = Field(
        default=INSTALLED,
        min_length=1,
        description=f"'{INSTALLED}' (their docstrings), a file or folder, s3://..., hf:NAME, or a database URL",
    )
    form: Form = Field(default="text", description="text, or an instruction set: alpaca, sharegpt, chat")
    text_column: str = Field(default="text", description="the column of a table that holds the text")
    title_column: str = Field(default="", description="the column that holds the title; empty: the row's place")
    source_column: str = Field(default="", description="the column that says where a row is from; empty: its place")
    id_column: str = Field(default="", description="the column that holds a unique id; empty: a hash of the content")
    instruction_column: str = Field(default="instruction", description="of an Alpaca row")
    input_column: str = Field(default="input", description="of an Alpaca row; may be absent")
    output_column: str = Field(default="output", description="of an Alpaca row")
    messages_column: str = Field(default="", description="of the others; empty: conversations, messages")
    packages: list[str] = Field(default=[], description="only these installed packages; empty: all")
    skip_packages: list[str] = Field(default=[], description="leave these installed packages out")
    query: str = Field(default="", description="what to read of a database: a table's name, or SQL")
    subset: str = Field(default="", description="of a Hugging Face data set")
    split: str = Field(default="train", description="of a Hugging Face data set")

    def columns(self) -> "Columns":
        """The column mapping."""
        from data_pipelines.columns import Columns
        from workbench.conversations import ExchangeColumns

        exchange = ExchangeColumns(self.instruction_column, self.input_column, self.output_column, self.messages_column)
        return Columns(self.text_column, self.title_column, self.source_column, self.id_column, self.form, exchange)


@dataclass(frozen=True)
class Opened:
    """The items to read, whether every node of a cluster sees them, and what is recorded of them as an input.

    ``left_out`` has the names of files that are of no kind that is read.
    """

    items: "Sequence[Item]"
    shared: bool
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def open_reading(reading: Reading) -> Opened:
    """What ``reading`` names. Raises UserError if there is nothing, or a column is missing."""
    source = reading.source
    scheme = source.partition("://")[0] if "://" in source else ""
    if source == INSTALLED:
        return _installed(reading)
    from data_pipelines.hub import PREFIX, hub_rows
    from data_pipelines.textfiles import text_files

    columns = reading.columns()
    if source.startswith(PREFIX):
        rows = hub_rows(source.removeprefix(PREFIX), reading.subset, reading.split, columns)
        return Opened(rows, False, source, {"subset": reading.subset, "split": reading.split})
    if scheme in FILE_URLS:
        files, left_out = text_files(source, columns)
        facts = {
            "source": redact(source),
            "files": len({file.path for file in files}),
            "bytes": sum(file.size for file in files),
        }
        return Opened(files, scheme != "file", "documents", facts, left_out)
    if scheme:
        from data_pipelines.databases import query_rows

        query = query_rows(source, reading.query, columns)
        return Opened([query], False, f"database {query.name}", {"query": query.statement})
    path = resolve_path(Path(source))
    if not path.exists():
        near = difflib.get_close_matches(source, [INSTALLED], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"give a path, or '{INSTALLED}'"
        raise UserError(f"source: no such file or folder: {path}; {hint}")
    files, left_out = text_files(path, columns)
    return Opened(files, path.is_relative_to(runs_root()), "documents", {"path": path}, left_out)


def _installed(reading: Reading) -> Opened:
    from data_pipelines.docstrings import installed_modules, normal_name, site_packages

    modules = installed_modules(site_packages())
    present = {module.package: module.version for module in modules}
    for name in [*reading.packages, *reading.skip_packages]:
        if normal_name(name) not in present:
            near = difflib.get_close_matches(normal_name(name), present, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"packages: '{name}' is not installed in this environment{hint}")
    only, without = set(map(normal_name, reading.packages)), set(map(normal_name, reading.skip_packages))
    chosen = [m for m in modules if (not only or m.package in only) and m.package not in without]
    versions = {name: present[name] for name in sorted({m.package for m in chosen})}
    return Opened(chosen, False, INSTALLED, {"packages": versions})
