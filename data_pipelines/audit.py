"""``workbench data audit configs/demo/audit.yaml``: count, measure and screen a set of documents.

Reading and measuring stream through Ray Data; the driver holds about 300 bytes a document (hashes and buckets), and
while it compares 8 bytes a shingle of those that share a bucket, never all the texts. Everything is ordered by document
id, so the same input gives the same documents and the same summary however the blocks arrive.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from cluster.placement import place_here
from data_pipelines.gates import Gate, check_gates, crossed
from data_pipelines.pii import KINDS
from data_pipelines.reading import Opened, Reading, open_reading
from workbench.errors import Failure, UserError
from workbench.resources import Placed
from workbench.runs import Run, Summary, finish

if TYPE_CHECKING:
    from data_pipelines.corpus import Corpus
    from data_pipelines.measure import Measures

TRAINING = "train"
SHOWN_FILES = 20
FIGURES = ("leakage", "duplicates", "quarantine", "personal", "secret", "mojibake", "conflict")
"""Shares, 0 to 1, that a gate may name beside the counts: of the evaluation documents that are in training documents,
of the documents that are duplicates, of the rows that could not be read, and of the documents with a finding."""
COUNTS = (
    "documents",
    "kept",
    "exact_duplicates",
    "near_duplicates",
    "quarantined",
    "leaks",
    "characters",
    *(f"{kind}s" for kind in KINDS),
)


class AuditConfig(Reading, Placed):
    """What to read, and where the line is drawn."""

    amounts: ClassVar[tuple[str, str]] = ("cpus_per_task", "")

    splits: dict[str, Reading] = Field(
        default={}, description="several sources by name, in place of 'source': {train: {source: ...}, test: {...}}"
    )
    evaluation: list[str] = Field(
        default=[], description=f"the splits that must not be in the others; empty: all but '{TRAINING}'"
    )
    ngram: int = Field(default=13, ge=5, le=50, description="words of a run that counts as a leak")
    max_characters: int = Field(default=100_000, ge=1, description="a longer text is quarantined")
    threshold: float = Field(
        default=0.8, ge=0.5, le=1, description="Jaccard similarity of 3-word shingles from which two texts are the same"
    )
    tokenizer: str = Field(default="", description="also count tokens: a tokenizer.json, a model's folder or name")
    repetition: bool = Field(default=True, description="measure repeated n-grams, as Gopher's rules do")
    phone_region: str = Field(default="", description="also find phone numbers without a +, as dialled in e.g. US")
    fail_on: list[str] = Field(
        default=[], description="exit code 1 where one holds: leakage>0, duplicates>0.05, secrets>0, ..."
    )
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

    @field_validator("fail_on")
    @classmethod
    def _known_gates(cls, gates: list[str]) -> list[str]:
        check_gates(gates, [*FIGURES, *COUNTS])
        return gates

    @model_validator(mode="after")
    def _gates_can_be_seen(self) -> Self:
        asked = {Gate.parse(text).name for text in self.fail_on}
        if len(self.splits) < 2 and (of_splits := asked & {"leakage", "leaks"}):
            raise ValueError(
                f"fail_on: {min(of_splits)} compares splits, and there is only one: give splits: "
                "{train: {source: ...}, test: {source: ...}}"
            )
        if "conflict" in asked and all(reading.form == "text" for reading in self.sources.values()):
            raise ValueError("fail_on: conflict is of instruction sets: say form=alpaca, sharegpt or chat")
        return self

    @model_validator(mode="after")
    def _splits_are_named(self) -> Self:
        if not self.splits:
            if self.evaluation:
                raise ValueError("evaluation names splits, and there are none: give splits: {train: ..., test: ...}")
            return self
        for name in self.splits:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"splits: '{name}': name a split by letters, digits, '-' and '_'")
        usual = Reading()
        if given := [name for name in Reading.model_fields if getattr(self, name) != getattr(usual, name)]:
            raise ValueError(f"{given[0]} is given beside splits: write it below each split that it is for")
        if missing := [name for name in self.evaluation if name not in self.splits]:
            raise ValueError(f"evaluation: there is no split '{missing[0]}', but {', '.join(self.splits)}")
        if len(self.splits) > 1 and not self.evaluation and TRAINING not in self.splits:
            raise ValueError(f"say which splits must not be in the others: evaluation: [{list(self.splits)[-1]}]")
        if self.evaluation and not self.trained:
            raise ValueError("evaluation names every split: leave out what is trained on")
        return self

    @property
    def sources(self) -> dict[str, Reading]:
        """The source of each split; one without a name where there are no splits."""
        return self.splits or {"": Reading(**{name: getattr(self, name) for name in Reading.model_fields})}

    @property
    def evaluated(self) -> list[str]:
        """The splits that must not be in the others; none where there is only one."""
        if len(self.splits) < 2:
            return []
        return self.evaluation or [name for name in self.splits if name != TRAINING]

    @property
    def trained(self) -> list[str]:
        """The other splits."""
        return [name for name in self.sources if name not in self.evaluated]


def check(config: AuditConfig) -> None:
    """Raise UserError where there is nothing to read."""
    from data_pipelines.tokens import locate_tokenizer

    for reading in config.sources.values():
        open_reading(reading)
    if config.tokenizer:
        locate_tokenizer(config.tokenizer)


def run(config: AuditConfig, run: Run) -> Summary:
    """Write ``artifacts/documents/`` (Parquet: every document with its findings, ``keep`` true for what survives),
    ``artifacts/quarantine.parquet`` and, where there are splits, ``artifacts/leaks.parquet``.

    Raises UserError where a source has no documents, Failure where a gate of ``fail_on`` is not passed; the report and
    the summary are then written all the same.
    """
    from data_pipelines.audit_report import describe
    from data_pipelines.corpus import Corpus

    opened = {split: open_reading(reading) for split, reading in config.sources.items()}
    for split, source in opened.items():
        run.input(f"{split}: {source.name}" if split else source.name, **source.facts)
        size = sum(item.size for item in source.items) / 1e6
        run.say(f"reading {f'{split}: ' if split else ''}{len(source.items):,} parts ({size:,.0f} MB)")
        if source.left_out:
            run.say(f"{len(source.left_out):,} files of other kinds are left out, such as {source.left_out[0]}")
            rows = [{"file": name} for name in source.left_out[:SHOWN_FILES]]
            run.report.table(f"Files left out: {len(source.left_out):,}", rows, note="none of the kinds that are read")
    began = time.monotonic()
    corpus = Corpus(run.artifact("documents"), run.artifact("quarantine.parquet"))
    with corpus:
        _measure(config, opened, corpus, run)
        measured = time.monotonic()
        run.say(f"looking for duplicates among {corpus.rows:,} documents")
        corpus.compare(config.threshold, config.evaluated)
        compared = time.monotonic()
        corpus.write(config.phone_region)
    seconds = {
        "read and measure": measured - began,
        "compare": compared - measured,
        "write": time.monotonic() - compared,
    }
    run.metrics(
        corpus.rows, **{f"seconds_{stage.replace(' ', '_')}": round(value, 2) for stage, value in seconds.items()}
    )
    summary = summarise(config, corpus)
    figures = shares(corpus) | {name: value for name, value in summary.items() if name in COUNTS}
    found = crossed(config.fail_on, figures)
    without = without_documents(config, corpus)
    if summary["documents"]:
        describe(run.report, corpus, config, figures, seconds)
    run.say(
        f"{summary['documents']:,} documents: {summary['exact_duplicates']:,} exact and "
        f"{summary['near_duplicates']:,} near duplicates, {summary['emails']:,} e-mail addresses, "
        f"{summary['quarantined']:,} quarantined"
    )
    if found:
        finish(run, summary | {"not_passed": found})
        raise Failure(f"{'; '.join([*found, *without])}; see {run.folder / 'report.html'}")
    if without:
        raise UserError("; ".join(without))
    return summary


def summarise(config: AuditConfig, corpus: "Corpus") -> Summary:
    """The counts of the audit."""
    figures = corpus.statistics
    leaks = {"leaks": len(corpus.leaks)} if config.evaluated else {}
    tokens = {"tokens": int(figures.lengths("tokens").sum())} if config.tokenizer else {}
    exchanges = {"conflicts": figures.conflicts} | dict(sorted(figures.flags.items())) if figures.turns else {}
    return {
        "documents": figures.documents,
        "kept": figures.kept,
        "exact_duplicates": figures.kinds["exact"],
        "near_duplicates": figures.kinds["near"],
        **leaks,
        "quarantined": len(corpus.quarantined),
        "characters": int(figures.lengths("characters").sum()),
        **tokens,
        "languages": len(figures.languages),
        "english_percent": round(100 * figures.languages["en"] / max(1, figures.documents), 1),
        **{f"{kind}s": figures.personal[kind] for kind in KINDS},
        **exchanges,
        "fingerprint": corpus.fingerprint,
    }


def shares(corpus: "Corpus") -> dict[str, float]:
    """The ``FIGURES``."""
    found = corpus.statistics
    documents = max(1, found.documents)
    rows = found.documents + len(corpus.quarantined)
    return {
        "leakage": len(corpus.leaks) / max(1, corpus.evaluation_documents),
        "duplicates": (found.documents - found.kept) / documents,
        "quarantine": len(corpus.quarantined) / max(1, rows),
        "personal": found.with_personal / documents,
        "secret": found.with_secrets / documents,
        "mojibake": found.mojibake / documents,
        "conflict": found.conflicts / documents,
    }


def without_documents(config: AuditConfig, corpus: "Corpus") -> list[str]:
    """What is wrong of each source that gave none: with nothing to compare, no leak is no answer."""
    said = []
    for split, reading in config.sources.items():
        if split not in corpus.statistics.splits:
            reasons = [row["reason"] for row in corpus.quarantined if row["split"] == split]
            which = f"splits.{split}: no documents" if split else "no documents"
            first = f" and all were quarantined, the first as '{reasons[0]}'" if reasons else ""
            said.append(f"{which} in {reading.source}: {len(reasons)} rows were read{first}")
    return said


def _measure(config: AuditConfig, opened: dict[str, Opened], corpus: "Corpus", run: Run) -> None:
    import ray

    from data_pipelines.measure import Measures
    from data_pipelines.tokens import locate_tokenizer

    measures = Measures(
        max_characters=config.max_characters,
        phone_region=config.phone_region,
        repetition=config.repetition,
        tokenizer=locate_tokenizer(config.tokenizer) if config.tokenizer else "",
        exchanges=any(reading.form != "text" for reading in config.sources.values()),
        gram=config.ngram if config.evaluated else 0,
    )
    for split in config.evaluated:
        _stream(config, opened[split], split, measures, corpus, run)
    if config.evaluated:
        measures = replace(measures, evaluation=ray.put(corpus.evaluation_hashes()))
    for split in config.trained:
        _stream(config, opened[split], split, measures, corpus, run)


def _stream(config: AuditConfig, opened: Opened, split: str, measures: "Measures", corpus: "Corpus", run: Run) -> None:
    import ray

    from data_pipelines.measure import measure
    from data_pipelines.sources import DocumentSource, quiet_progress, split_evenly

    quiet_progress()
    placement = place_here(config.request(), run.say)
    options: dict[str, Any] = placement.data_options()
    source = DocumentSource(split_evenly(opened.items, config.blocks), shared=opened.shared, split=split)
    dataset = ray.data.read_datasource(
        source, override_num_blocks=source.tasks, num_cpus=placement.num_cpus, ray_remote_args=options
    ).map_batches(
        measure,
        fn_kwargs={"measures": measures},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=placement.num_cpus,
        **options,
    )
    evaluation = split in config.evaluated
    spoken = time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        corpus.add(batch, evaluation=evaluation)
        if time.monotonic() - spoken > 5:
            spoken = time.monotonic()
            found = corpus.personal
            run.say(f"{corpus.rows:,} documents so far, {found['email']:,} e-mail addresses")
            run.metrics(corpus.rows, documents=corpus.rows, **{f"{kind}s": found[kind] for kind in KINDS})
