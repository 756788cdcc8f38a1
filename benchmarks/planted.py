"""What an audit made of the faults that were planted: found, missed, and said where there is none."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from data_pipelines.pii import KINDS

FINDINGS = ("id", "duplicate_of", "duplicate_kind", "similarity", *(f"{kind}s" for kind in KINDS))


@dataclass
class Score:
    """One kind of fault: how many were planted and found exactly as planted, and the ids of those ``missed`` and of
    those where more was ``beyond`` what was planted. ``natural`` counts findings in the text as it was: no error."""

    fault: str
    planted: int
    missed: list[str]
    beyond: list[str]
    natural: int = 0

    @property
    def right(self) -> bool:
        """Whether the audit found these faults and no others."""
        return not self.missed and not self.beyond

    def line(self) -> dict[str, Any]:
        """For a table."""
        row = {"fault": self.fault, "planted": self.planted, "found": self.planted - len(self.missed)}
        return row | {"missed": len(self.missed), "beyond": len(self.beyond), "natural": self.natural}


def score(corpus: Path, artifacts: Path, threshold: float = 0.8) -> list[Score]:
    """Compare ``planted.json`` of ``corpus`` with what an audit of its splits train and test wrote to ``artifacts``."""
    planted = json.loads((corpus / "planted.json").read_text())
    table = ds.dataset(str(artifacts / "documents"), format="parquet").to_table(columns=list(FINDINGS))
    rows = {row["id"]: row for row in table.to_pylist()}
    leaks: list[dict[str, Any]] = []
    if (artifacts / "leaks.parquet").exists():
        leaks = pq.read_table(artifacts / "leaks.parquet").to_pylist()
    quarantined = pq.read_table(artifacts / "quarantine.parquet").to_pylist()
    return [
        *_duplicates(planted, rows, threshold),
        *_personal(planted, rows),
        *_leaks(planted, leaks),
        *_broken(planted, quarantined),
        Score("documents", planted["rows"], [] if len(rows) == planted["rows"] else [f"{len(rows)} were counted"], []),
    ]


def _duplicates(planted: dict[str, Any], rows: dict[str, dict[str, Any]], threshold: float) -> list[Score]:
    """Of a pair one is kept and the other points at it; a pair under the threshold is kept whole."""

    def pointing(entry: dict[str, Any]) -> list[dict[str, Any]]:
        names = [f"train/{entry[name]}" for name in ("id", "of")]
        pair = [rows[name] for name in names if name in rows]
        return [row for row in pair if row["duplicate_of"]]

    def paired(entry: dict[str, Any], kind: str, similarity: float) -> bool:
        found = pointing(entry)
        same = {f"train/{entry[name]}" for name in ("id", "of")}
        return [
            {row["id"], row["duplicate_of"]} == same
            and row["duplicate_kind"] == kind
            and abs(row["similarity"] - similarity) < 1e-6
            for row in found
        ] == [True]

    missed = [entry["id"] for entry in planted["exact"] if not paired(entry, "exact", 1.0)]
    kinds = [row["duplicate_kind"] for row in rows.values()]
    scores = [Score("exact duplicate", len(planted["exact"]), missed, [], kinds.count("exact") - len(planted["exact"]))]
    alike = 0
    for level in dict.fromkeys(entry["level"] for entry in planted["near"]):
        mine = [entry for entry in planted["near"] if entry["level"] == level]
        if level >= threshold:
            missed = [entry["id"] for entry in mine if not paired(entry, "near", entry["jaccard"])]
            alike += len(mine)
            scores.append(Score(f"near duplicate, Jaccard {level:g}", len(mine), missed, []))
        else:
            beyond = [entry["id"] for entry in mine if pointing(entry)]
            scores.append(Score(f"no duplicate, Jaccard {level:g}", len(mine), [], beyond))
    scores.append(Score("near duplicates of nature", 0, [], [], kinds.count("near") - alike))
    return scores


def _personal(planted: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[Score]:
    scores = []
    for kind in KINDS:
        wanted = [entry["id"] for entry in planted["personal"] if entry["kind"] == kind]
        found = {name: rows.get(f"train/{name}", {}).get(f"{kind}s", 0) for name in wanted}
        bait = [e["id"] for e in planted["lookalikes"]] + [e["id"] for e in planted["personal"] if e["kind"] != kind]
        beyond = [name for name in bait if rows.get(f"train/{name}", {}).get(f"{kind}s", 0)]
        beyond += [name for name, times in found.items() if times > 1]
        whole = sum(row[f"{kind}s"] for row in rows.values())
        missed = [name for name, times in found.items() if not times]
        scores.append(Score(f"personal: {kind}", len(wanted), missed, beyond, whole - sum(found.values())))
    return scores


def _leaks(planted: dict[str, Any], leaks: list[dict[str, Any]]) -> list[Score]:
    found = {leak["evaluation_id"].removeprefix("test/"): leak for leak in leaks}
    scores = []
    for kind in ("exact", "near", "ngram"):
        mine = [entry for entry in planted["leaks"] if entry["kind"] == kind]
        missed = []
        for entry in mine:
            leak = found.get(entry["id"])
            right = leak and leak["kind"] == kind and leak["training_id"] == f"train/{entry['of']}"
            if not right or not leak or (kind == "ngram" and leak["words"] != entry["words"]):
                missed.append(entry["id"])
        scores.append(Score(f"leak: {kind}", len(mine), missed, []))
    real = {entry["id"] for entry in planted["leaks"] if entry["kind"]}
    clean = len(planted["clean"]) + len(planted["leaks"]) - len(real)
    scores.append(Score("no leak", clean, [], sorted(found.keys() - real)))
    return scores


def _broken(planted: dict[str, Any], quarantined: list[dict[str, Any]]) -> list[Score]:
    """By reason: which source each row was quarantined from."""
    seen: dict[str, list[str]] = {}
    wanted: dict[str, list[str]] = {}
    for row in quarantined:
        seen.setdefault(row["reason"], []).append(row["source"])
    for entry in planted["broken"]:
        wanted.setdefault(entry["reason"], []).append(entry["source"])
    scores = []
    for reason in sorted(seen.keys() | wanted.keys()):
        own, there = wanted.get(reason, []), seen.get(reason, [])
        missed, beyond = _without(own, there), _without(there, own)
        scores.append(Score(f"not read: {reason}", len(own), missed, beyond))
    return scores


def _without(some: list[str], others: list[str]) -> list[str]:
    """``some`` less ``others``, each as often as it is there."""
    rest = list(some)
    for name in others:
        if name in rest:
            rest.remove(name)
    return rest
