"""What the audit measures of each document, a batch at a time on Arrow tables."""

import functools
import hashlib
from typing import TYPE_CHECKING, Any

from data_pipelines.duplicates import band_keys, normal_hash, words_of
from data_pipelines.pii import KINDS, counts

if TYPE_CHECKING:
    import pyarrow as pa

LANGUAGE_CHARACTERS = 200
"""Language is told from the start of a text: more hardly changes the answer and costs time."""


def document_id(text: str, source: str) -> str:
    """32 hex digits that name a document by its content and where it is from."""
    return hashlib.blake2b(f"{source}\0{text}".encode(), digest_size=16).hexdigest()


def measure(batch: "pa.Table", max_characters: int, phone_region: str) -> "pa.Table":
    """Add to ``title, text, source, reason``: id, characters, words, language, normal_hash, bands (uint64 as bytes)
    and one count per kind of personal data. Empty and over-long texts get a reason."""
    import pyarrow as pa

    texts = batch["text"].to_pylist()
    sources = batch["source"].to_pylist()
    words = [words_of(text) for text in texts]
    reasons = [
        reason or ("empty" if not own else "too long" if len(text) > max_characters else "")
        for text, own, reason in zip(texts, words, batch["reason"].to_pylist(), strict=True)
    ]
    good = ["" if reason else text for text, reason in zip(texts, reasons, strict=True)]
    good_words = [[] if reason else own for own, reason in zip(words, reasons, strict=True)]
    personal = [counts(text, phone_region) for text in good]
    columns: dict[str, Any] = {
        "id": [document_id(text, source) for text, source in zip(texts, sources, strict=True)],
        "title": batch["title"],
        "text": batch["text"],
        "source": batch["source"],
        "reason": reasons,
        "characters": pa.array([len(text) for text in texts], pa.int32()),
        "words": pa.array([len(own) for own in words], pa.int32()),
        "language": [language(text) for text in good],
        "normal_hash": pa.array([normal_hash(own) for own in good_words], pa.binary(16)),
        "bands": pa.array([row.tobytes() for row in band_keys(good_words)], pa.binary()),
    }
    for position, kind in enumerate(KINDS):
        columns[f"{kind}s"] = pa.array([row[position] for row in personal], pa.int32())
    return pa.table(columns)


def language(text: str) -> str:
    """ISO 639-1 code of the text's language, "und" where the text does not tell."""
    if not text:
        return "und"
    label: str = _identifier().classify(text[:LANGUAGE_CHARACTERS])[0]
    return label


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)
