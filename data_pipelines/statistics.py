"""The figures of an audit: counted while the documents are written, a table of one shard at a time."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.exchanges import FLAGS
from data_pipelines.pii import KINDS, find, redact

PII_EXAMPLES = 5
OUTLIERS = 5
SHARES = (
    "compression", "distinct_words", "word_length", "alphabetic_words", "symbols", "duplicate_lines",
    "top_2gram", "top_3gram", "top_4gram", "repeated_5gram", "repeated_10gram",
)  # fmt: skip
"""Findings whose distribution is shown."""
LENGTHS = ("characters", "words", "tokens", "asked_characters", "answer_characters")
SCREENS = ("gopher_quality", "gopher_repetition", "c4")
VOCABULARY = 2048
MOST_GROUPS = 2000
OTHER_GROUPS = "(others)"
"""Of a folder of many single files only so many are told apart."""


def group_of(source: str) -> str:
    """What a document's source belongs to: a package, a file."""
    return source.split(" ", 1)[0].rsplit(":", 1)[0]


def snippet(text: str, phone_region: str = "", characters: int = 120) -> str:
    """The start of a text on one line, fit for a report: without personal data, as ``pii.find`` finds it."""
    line = " ".join(redact(text[: 4 * characters], KINDS, phone_region)[0].split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


@dataclass
class Statistics:
    """Fill with ``update``; the attributes are counts of documents unless they say otherwise."""

    phone_region: str = ""
    documents: int = 0
    kept: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    splits: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    personal: Counter[str] = field(default_factory=Counter)
    with_personal: int = 0
    with_secrets: int = 0
    broken: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    flags: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    conflicts: int = 0
    mojibake: int = 0
    boilerplate: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    largest: list[dict[str, Any]] = field(default_factory=list)
    longest: list[dict[str, Any]] = field(default_factory=list)
    shortest: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    groups: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    _smallest_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def sample_words(self, hashes: bytes) -> None:
        """Take the smallest word hashes of a batch (uint64)."""
        both = np.concatenate([self._smallest_hashes, np.frombuffer(hashes, dtype=np.uint64)])
        self._smallest_hashes = np.unique(both)[:VOCABULARY]

    @property
    def distinct_words(self) -> int:
        """An estimate of how many there are, good to two percent, from the smallest hashes (Bar-Yossef et al. 2002)."""
        known = self._smallest_hashes
        if len(known) < VOCABULARY:
            return len(known)
        return int((VOCABULARY - 1) / (float(known[-1]) / 2**64))

    def lengths(self, name: str) -> np.ndarray:
        """One of ``LENGTHS`` or ``SHARES`` of every document, in no order; empty where it was not measured."""
        parts = self.values.get(name)
        return np.concatenate(parts) if parts else np.zeros(0)

    def update(self, table: pa.Table, clusters: dict[str, int]) -> None:
        """Count the documents of ``table``; ``clusters`` has the copies of the survivors to be shown."""
        names = set(table.column_names)
        kinds = Counter(table["duplicate_kind"].to_pylist())
        self.documents += table.num_rows
        self.kept += kinds[""]
        self.kinds.update(kinds)
        self.languages.update(table["language"].to_pylist())
        self.scripts.update(table["script"].to_pylist())
        for name in (*LENGTHS, *SHARES):
            if name in names:
                self.values[name].append(table[name].to_numpy())
        self._split(table)
        self._group(table)
        for name in SCREENS:
            for rules, number in Counter(table[name].to_pylist()).items():
                self.broken[name].update(dict.fromkeys(rules.split(), number))
                self.broken[name]["any"] += number if rules else 0
        self.mojibake += int(pc.sum(pc.greater(table["mojibake"], 0)).as_py() or 0)
        self.boilerplate += int(pc.sum(pc.greater(table["boilerplate"], 0)).as_py() or 0)
        if "flags" in names:
            self._exchanges(table)
        self._personal(table)
        for row in _chosen(table, pc.is_in(table["id"], pa.array(list(clusters), pa.string()))):
            shown = {"copies": clusters[row["id"]], "title": row["title"]}
            self.largest.append(shown | {"text": snippet(row["text"], self.phone_region), "source": row["source"]})
        self._outliers(table)

    def _split(self, table: pa.Table) -> None:
        for row in (
            table.group_by(["split", "duplicate_kind"]).aggregate([("id", "count"), ("characters", "sum")]).to_pylist()
        ):
            counts = self.splits[row["split"]]
            counts["documents"] += row["id_count"]
            counts["characters"] += row["characters_sum"]
            counts[row["duplicate_kind"] or "kept"] += row["id_count"]
        if "leak" in table.column_names:
            for row in table.group_by(["split", "leak"]).aggregate([("id", "count")]).to_pylist():
                self.splits[row["split"]]["leaks"] += row["id_count"] if row["leak"] else 0

    def _group(self, table: pa.Table) -> None:
        names = pa.array([group_of(source) for source in table["source"].to_pylist()]).dictionary_encode()
        order = np.argsort(names.indices.to_numpy(), kind="stable")
        codes = names.indices.to_numpy()[order]
        lengths = table["characters"].to_numpy()[order]
        edges = np.searchsorted(codes, np.arange(len(names.dictionary) + 1))
        for place, name in enumerate(names.dictionary.to_pylist()):
            known = name in self.groups or len(self.groups) < MOST_GROUPS
            self.groups[name if known else OTHER_GROUPS].append(lengths[edges[place] : edges[place + 1]])

    def _exchanges(self, table: pa.Table) -> None:
        for flags, number in Counter(table["flags"].to_pylist()).items():
            self.flags.update(dict.fromkeys(flags.split(), number))
        assert set(self.flags) <= set(FLAGS)
        labels = Counter(table["label"].to_pylist())
        self.labelled += table.num_rows - labels.pop("", 0)
        self.labels.update(labels)
        if len(self.labels) > 10_000:  # free text, not labels: the rare ones are of no interest
            self.labels = Counter(dict(self.labels.most_common(2_000)))
        self.turns.update(table["turns"].to_pylist())
        self.conflicts += int(pc.sum(pc.greater(table["conflicts"], 0)).as_py() or 0)

    def _personal(self, table: pa.Table) -> None:
        any_of = np.zeros(table.num_rows, dtype=bool)
        wanted = np.zeros(table.num_rows, dtype=bool)
        seen = Counter(example["kind"] for example in self.examples)
        for kind in KINDS:
            found = table[f"{kind}s"].to_numpy()
            self.personal[kind] += int(found.sum())
            any_of |= found > 0
            if seen[kind] < PII_EXAMPLES:
                wanted |= found > 0
        self.with_personal += int(any_of.sum())
        self.with_secrets += int((table["secrets"].to_numpy() > 0).sum())
        for row in _chosen(table, pa.array(wanted)):
            if all(seen[kind] >= PII_EXAMPLES for kind in KINDS if row[f"{kind}s"]):
                continue
            for finding in find(row["text"], self.phone_region):
                if seen[finding.kind] < PII_EXAMPLES:
                    seen[finding.kind] += 1
                    shown = {"kind": finding.kind, "masked": finding.masked()}
                    self.examples.append(shown | {"title": row["title"], "source": row["source"]})

    def _outliers(self, table: pa.Table) -> None:
        keys = [("characters", "descending"), ("id", "ascending")]
        for name, order in (("longest", keys), ("shortest", [("characters", "ascending"), keys[1]])):
            places = pc.select_k_unstable(table, k=min(OUTLIERS, table.num_rows), sort_keys=order)
            sign = -1 if name == "longest" else 1
            rows = getattr(self, name)
            for row in table.select(["id", "characters", "title", "source", "text"]).take(places).to_pylist():
                rows.append(row | {"text": snippet(row["text"], self.phone_region)})
            rows.sort(key=lambda row: (sign * row["characters"], row["id"]))
            del rows[OUTLIERS:]


def _chosen(table: pa.Table, mask: Any) -> list[dict[str, Any]]:
    columns = ["id", "title", "source", "text", *(f"{kind}s" for kind in KINDS)]
    rows: list[dict[str, Any]] = table.select(columns).filter(mask).to_pylist()
    return rows
