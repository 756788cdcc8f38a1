"""What the audit measures of each document, a batch at a time on Arrow tables."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.duplicates import band_keys, normal_hash
from data_pipelines.exchanges import flags_of, keys_of, lengths_of
from data_pipelines.language import languages
from data_pipelines.ngrams import Words
from data_pipelines.pii import KINDS, counts
from data_pipelines.quality import quality
from data_pipelines.tokens import token_counts
from data_pipelines.words import words_of

if TYPE_CHECKING:
    import pyarrow as pa

VOCABULARY_SAMPLE = 2048
"""How many of a batch's smallest word hashes are kept to estimate how many distinct words there are."""


@dataclass(frozen=True)
class Measures:
    """What is measured of a document, and with what; ``tokenizer`` is a path, empty for none.

    ``evaluation`` has the sorted n-gram hashes of the evaluation splits, or is a Ray reference to them, and ``gram`` is
    their n: 0 where they are neither made nor looked for. ``exchanges`` says that the rows are of an instruction set.
    """

    max_characters: int = 100_000
    phone_region: str = ""
    repetition: bool = True
    tokenizer: str = ""
    exchanges: bool = False
    gram: int = 0
    evaluation: Any = None


def ids_of(keys: list[str], contents: list[str], splits: list[str]) -> list[str]:
    """The id of each document: the given one, after its split's name where there are splits, or 32 hex digits of its
    content and split. Those of equal documents are told apart later (``Index.close``)."""
    return [
        (f"{split}/{key}" if split else key)
        if key
        else hashlib.blake2b(f"{split}\0{content}".encode(), digest_size=16).hexdigest()
        for key, content, split in zip(keys, contents, splits, strict=True)
    ]


def content_key(*parts: str) -> int:
    """64 bits that tell two rows with the same id apart."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def measure(batch: "pa.Table", measures: Measures) -> "pa.Table":
    """Replace the rows of a source by documents with their findings, and empty and over-long texts get a reason.

    ``id``, ``unnamed`` (the id is made of the content), ``title``, ``text``, ``source``, ``split``, ``conversation``
    and ``reason`` come first. Of what only the
    audit itself needs, bytes: ``normal_hash``, ``bands`` (uint64), ``content`` (uint64), ``vocabulary`` and ``grams``
    (uint64, of an evaluation split all, else those of the evaluation splits), ``prompt_hash`` and ``answer_hash``.
    """
    import pyarrow as pa

    texts = batch["text"].to_pylist()
    sources = batch["source"].to_pylist()
    titles = batch["title"].to_pylist()
    keys, splits = batch["key"].to_pylist(), batch["split"].to_pylist()
    said_and_texts = list(zip(batch["conversation"].to_pylist(), texts, strict=True))
    words = [words_of(text) for text in texts]
    reasons = [
        reason
        or (
            ("no words" if text.strip() else "empty")
            if not own
            else "too long"
            if len(text) > measures.max_characters
            else ""
        )
        for text, own, reason in zip(texts, words, batch["reason"].to_pylist(), strict=True)
    ]
    good = ["" if reason else text for text, reason in zip(texts, reasons, strict=True)]
    good_words = [[] if reason else own for own, reason in zip(words, reasons, strict=True)]
    table = Words.of(good_words)
    columns: dict[str, Any] = {
        "id": ids_of(keys, [f"{said}\0{text}" if said else text for said, text in said_and_texts], splits),
        "unnamed": [not key for key in keys],
        "title": batch["title"],
        "text": batch["text"],
        "source": batch["source"],
        "split": batch["split"],
        "conversation": batch["conversation"],
        "reason": reasons,
        "characters": pa.array([len(text) for text in texts], pa.int32()),
        "words": pa.array([len(own) for own in words], pa.int32()),
        "language": languages(good),
    }
    if measures.tokenizer:
        columns["tokens"] = pa.array(token_counts(good, measures.tokenizer), pa.int32())
    columns |= quality(good, good_words, table, ngrams=measures.repetition)
    found = [counts(text, measures.phone_region) for text in good]
    for place, kind in enumerate(KINDS):
        columns[f"{kind}s"] = pa.array([row[place] for row in found], pa.int32())
    if measures.exchanges:
        columns |= _exchanges(batch["conversation"].to_pylist(), reasons)
    columns["normal_hash"] = pa.array([normal_hash(own) for own in good_words], pa.binary(16))
    columns["bands"] = pa.array([row.tobytes() for row in band_keys(good_words)], pa.binary())
    parts = zip(titles, sources, texts, strict=True)
    columns["content"] = pa.array(np.array([content_key(*each) for each in parts], dtype=np.uint64))
    sample = np.sort(table.vocabulary_hashes)[:VOCABULARY_SAMPLE].tobytes()
    columns["vocabulary"] = pa.array([b"" if place else sample for place in range(len(texts))], pa.binary())
    if measures.gram:
        columns["grams"] = pa.array(_grams(table, measures), pa.binary())
    return pa.table(columns)


def _exchanges(conversations: list[str], reasons: list[str]) -> dict[str, Any]:
    """Findings of an instruction set; plain text, and what could not be read, has empty ones."""
    import pyarrow as pa

    pairs = zip(conversations, reasons, strict=True)
    parsed = [json.loads(each) if each and not reason else [] for each, reason in pairs]
    flags = [" ".join(flags_of(each)) if each else "" for each in parsed]
    keys = [keys_of(each) if each else (bytes(16), bytes(16), "") for each in parsed]
    lengths = np.array([lengths_of(each) for each in parsed], dtype=np.int32).reshape(-1, 3)
    return {
        "turns": lengths[:, 0],
        "asked_characters": lengths[:, 1],
        "answer_characters": lengths[:, 2],
        "flags": flags,
        "label": [label for _, _, label in keys],
        "prompt_hash": pa.array([prompt for prompt, _, _ in keys], pa.binary(16)),
        "answer_hash": pa.array([answer for _, answer, _ in keys], pa.binary(16)),
    }


def _grams(table: Words, measures: Measures) -> list[bytes]:
    """The n-gram hashes of each text as bytes, each once: all, or those that are among the evaluation's."""
    hashes, at = table.hashes(measures.gram)
    owners = table.owners[at]
    if measures.evaluation is not None:
        known = measures.evaluation
        if not isinstance(known, np.ndarray):
            import ray

            known = ray.get(known)
        if len(known):
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            shared = known[place] == hashes
        else:
            shared = np.zeros(len(hashes), dtype=bool)
        hashes, owners = hashes[shared], owners[shared]
    edges = np.searchsorted(owners, np.arange(len(table.counts) + 1))
    return [np.unique(hashes[first:end]).tobytes() if end > first else b"" for first, end in itertools.pairwise(edges)]
