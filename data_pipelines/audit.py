"""``workbench data audit configs/demo/audit.yaml``: count, measure and screen a set of documents.

Reading and measuring stream through Ray Data; the driver holds about 300 bytes a document (hashes and buckets), never
all the texts. Everything is ordered by document id, so the same input gives the same documents and the same summary
however the blocks arrive.
"""

import difflib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from cluster.placement import place_here
from data_pipelines.pii import KINDS
from workbench.config import resolve_path
from workbench.errors import UserError
from workbench.resources import Placed
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    from data_pipelines.sources import Item

INSTALLED = "installed-packages"


class AuditConfig(Placed):
    """What to read, and where the line is drawn."""

    amounts: ClassVar[tuple[str, str]] = ("cpus_per_task", "")

    source: str = Field(
        default=INSTALLED,
        description=f"'{INSTALLED}' (their docstrings), or a path: Parquet, JSON Lines, or a folder of text files",
    )
    text_column: str = Field(default="text", description="the column of a table that holds the text")
    title_column: str = Field(default="", description="the column that holds the title; empty: the row's place")
    source_column: str = Field(default="", description="the column that says where a row is from; empty: its place")
    packages: list[str] = Field(default=[], description="only these installed packages; empty: all")
    skip_packages: list[str] = Field(default=[], description="leave these installed packages out")
    max_characters: int = Field(default=100_000, ge=1, description="a longer text is quarantined")
    threshold: float = Field(
        default=0.8, ge=0.5, le=1, description="Jaccard similarity of 3-word shingles from which two texts are the same"
    )
    phone_region: str = Field(default="", description="also find phone numbers without a +, as dialled in e.g. US")
    cpus_per_task: float = Field(default=1, gt=0, description="CPUs that one reading task asks of Ray")
    blocks: int = Field(default=64, ge=1, description="how many reading tasks the input is split into")

    @field_validator("phone_region")
    @classmethod
    def _known_region(cls, region: str) -> str:
        if region:
            from phonenumbers import SUPPORTED_REGIONS

            if region not in SUPPORTED_REGIONS:
                raise ValueError("not a region of two capital letters that libphonenumber knows, such as US or DE")
        return region


@dataclass(frozen=True)
class Opened:
    """The files to read, whether every node of a cluster sees them, and what is recorded of them as an input."""

    items: "Sequence[Item]"
    shared: bool
    name: str
    facts: dict[str, Any]


def check(config: AuditConfig) -> None:
    """Raise UserError where there is nothing to read."""
    open_source(config)


def run(config: AuditConfig, run: Run) -> Summary:
    """Write ``artifacts/documents/`` (Parquet, ``keep`` true for what survives) and ``artifacts/quarantine.parquet``.

    Raises UserError where there is nothing to read.
    """
    from data_pipelines.audit_report import describe
    from data_pipelines.corpus import Corpus

    source = open_source(config)
    items = source.items
    run.input(source.name, **source.facts)
    run.say(f"reading {len(items):,} files ({sum(item.size for item in items) / 1e6:,.0f} MB)")
    began = time.monotonic()
    corpus = Corpus(run.artifact("documents"), run.artifact("quarantine.parquet"))
    with corpus:
        _measure(config, source, corpus, run)
        measured = time.monotonic()
        run.say(f"looking for duplicates among {corpus.rows:,} documents")
        corpus.find_duplicates(config.threshold)
        compared = time.monotonic()
        corpus.write(config.phone_region)
    if not corpus.documents:
        raise UserError(f"no documents in {config.source}: {corpus.rows} rows were read and all were quarantined")
    seconds = {
        "read and measure": measured - began,
        "find duplicates": compared - measured,
        "write": time.monotonic() - compared,
    }
    summary = {
        "documents": corpus.documents,
        "kept": corpus.kept,
        "exact_duplicates": corpus.exact_duplicates,
        "near_duplicates": corpus.near_duplicates,
        "quarantined": len(corpus.quarantined),
        "characters": sum(corpus.lengths),
        "languages": len(corpus.languages),
        "english_percent": round(100 * corpus.languages["en"] / corpus.documents, 1),
        **{f"{kind}s": corpus.personal[kind] for kind in KINDS},
        "fingerprint": corpus.fingerprint,
    }
    describe(run.report, corpus, seconds)
    run.say(
        f"{corpus.documents:,} documents: {corpus.exact_duplicates:,} exact and {corpus.near_duplicates:,} near "
        f"duplicates, {corpus.personal['email']:,} e-mail addresses, {len(corpus.quarantined):,} quarantined"
    )
    return summary


def open_source(config: AuditConfig) -> Opened:
    """What ``config`` names. Raises UserError if there are no files, or a column is missing."""
    from workbench.config import runs_root

    if config.source == INSTALLED:
        return _installed(config)
    from data_pipelines.textfiles import Columns, text_files

    path = resolve_path(Path(config.source))
    if not path.exists():
        near = difflib.get_close_matches(config.source, [INSTALLED], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"give a path, or '{INSTALLED}'"
        raise UserError(f"source: no such file or folder: {path}; {hint}")
    columns = Columns(config.text_column, config.title_column, config.source_column)
    return Opened(text_files(path, columns), path.is_relative_to(runs_root()), "documents", {"path": path})


def _installed(config: AuditConfig) -> Opened:
    from data_pipelines.docstrings import installed_modules, normal_name, site_packages

    modules = installed_modules(site_packages())
    present = {module.package: module.version for module in modules}
    for name in [*config.packages, *config.skip_packages]:
        if normal_name(name) not in present:
            near = difflib.get_close_matches(normal_name(name), present, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"packages: '{name}' is not installed in this environment{hint}")
    only, without = set(map(normal_name, config.packages)), set(map(normal_name, config.skip_packages))
    chosen = [m for m in modules if (not only or m.package in only) and m.package not in without]
    versions = {name: present[name] for name in sorted({m.package for m in chosen})}
    return Opened(chosen, False, INSTALLED, {"packages": versions})


def _measure(config: AuditConfig, opened: Opened, corpus: Any, run: Run) -> None:
    import ray

    from data_pipelines.measure import measure
    from data_pipelines.sources import DocumentSource, quiet_progress, split_evenly

    quiet_progress()
    placement = place_here(config.request(), run.say)
    source = DocumentSource(split_evenly(opened.items, config.blocks), shared=opened.shared)
    dataset = ray.data.read_datasource(
        source, override_num_blocks=source.tasks, num_cpus=placement.num_cpus, ray_remote_args=placement.data_options()
    ).map_batches(
        measure,
        fn_kwargs={"max_characters": config.max_characters, "phone_region": config.phone_region},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=placement.num_cpus,
        **placement.data_options(),
    )
    spoken = time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        corpus.add(batch)
        if time.monotonic() - spoken > 5:
            spoken = time.monotonic()
            found = Counter(corpus.personal)
            run.say(f"{corpus.rows:,} documents so far, {found['email']:,} e-mail addresses")
            run.metrics(corpus.rows, documents=corpus.rows, **{f"{kind}s": found[kind] for kind in KINDS})
