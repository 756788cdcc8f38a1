"""What a load test asks: questions of ours, prompts of a file, with prefixes that many share, or recorded traffic."""

import contextlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve.traffic import Prompt
from workbench.errors import UserError

QUESTIONS = [
    "How many rings does this molecule have: c1ccc2ccccc2c1?",
    "Name the functional groups of CC(=O)O.",
    "Explain in one sentence what a hash table is.",
    "Which element has the symbol Fe?",
    "Write the molecular formula of ethanol.",
    "What does a compiler do?",
    "Is benzene aromatic? Answer yes or no and why.",
    "List three uses of a queue in an operating system.",
]
"""Prompts where no file is given."""
FORM = "JSONL with 'prompt', or 'instruction' and 'input'"
COLUMNS = ["time", "body", "completion_tokens"]
"""What a replay needs of the request log."""
REPLAYED = "'time' or 'timestamp' in seconds, and 'messages', 'prompt' or 'body'"


def read_prompts(path: Path, limit: int) -> list[str]:
    """The first ``limit`` prompts of a JSONL file. Raises UserError if it is no text, naming the line that has none."""
    prompts: list[str] = []
    for place, line in _lines(path, FORM):
        if len(prompts) == limit:
            break
        try:
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else f"{row['instruction']}\n{row.get('input') or ''}"
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{place}: a line is {FORM.replace('JSONL', 'JSON')}") from None
        prompts.append(str(text).strip())
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def _lines(path: Path, form: str) -> Iterator[tuple[str, str]]:
    """Place and text of every line that is not empty."""
    try:
        with path.open(encoding="utf-8") as lines:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise UserError(f"prompts: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts: {path} is not text: give {form}") from None


def with_prefixes(prompts: Sequence[str], prefixes: int, words: int, seed: int) -> list[str]:
    """``prompts``, each after one of ``prefixes`` texts of ``words`` random words: what a prefix cache is for."""
    chosen = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ol")]
    texts = [
        " ".join("".join(chosen.choices(syllables, k=chosen.randint(1, 3))) for _ in range(words))
        for _ in range(prefixes)
    ]
    return [f"{texts[index % prefixes]}\n\n{prompt}" for index, prompt in enumerate(prompts)]


def read_replay(path: Path, limit: int, speed: float, max_tokens: int) -> list[Prompt]:
    """Recorded traffic: JSONL, or a folder of the gateway's request log. Times are from the first request on, divided
    by ``speed``. An answer has its recorded ``completion_tokens``, else as many as the request asked, else
    ``max_tokens``.

    Raises UserError for a row without a time or a prompt.
    """
    rows = list(_parquet(path) if path.is_dir() else _jsonl(path))[:limit]
    if not rows:
        raise UserError(f"{path} holds no requests")
    first = min(at for at, _, _ in rows)
    replayed = [
        Prompt(_messages(body), _length(body, written, max_tokens), (at - first) / speed) for at, body, written in rows
    ]
    return sorted(replayed, key=lambda prompt: prompt.at)


def _jsonl(path: Path) -> Iterator[tuple[float, dict[str, Any], int]]:
    """Time, body and tokens of the answer (0: not recorded) of each request."""
    for place, line in _lines(path, f"JSONL with {REPLAYED}"):
        try:
            row = json.loads(line)
            body = row.get("body", row)
            body = json.loads(body) if isinstance(body, str) else body
            at = float(row["time"] if "time" in row else row["timestamp"])
            written = int(row.get("completion_tokens") or 0)
            _messages(body)
            _length(body, written, 1)
            if not math.isfinite(at):
                raise ValueError(f"time {at}")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{place}: a recorded request is JSON with {REPLAYED}") from None
        yield at, body, written


def _parquet(path: Path) -> Iterator[tuple[float, dict[str, Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.glob("requests-*.parquet")) or sorted(path.glob("*.parquet"))
    if not files:
        raise UserError(f"{path} holds no Parquet files of a request log")
    try:
        rows = [row for file in files for row in pq.read_table(file, columns=COLUMNS).to_pylist()]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no request log: {error}") from None
    for row in rows:
        body = json.loads(row["body"]) if row["body"] else None
        if isinstance(body, dict) and ("messages" in body or isinstance(body.get("prompt"), str)):
            with contextlib.suppress(ValueError):  # the engine refused it then
                written = row["completion_tokens"] or 0
                _length(body, written, 1)
                yield row["time"], body, written
    if not any(row["body"] for row in rows):
        raise UserError(f"{path} keeps no texts: record with 'text: true' to replay it")


def _length(body: dict[str, Any], written: int, otherwise: int) -> int:
    """Tokens of an answer: those ``written`` (0: not known), at most as many as the body asks for, else what it asks
    for, else ``otherwise``. Raises ValueError where that is no number above 0."""
    length = body.get("max_completion_tokens") or body.get("max_tokens") or written or otherwise
    if not isinstance(length, int) or length < 1 or written < 0:
        raise ValueError(f"max_tokens {length}, completion_tokens {written}")
    return min(length, written or length)


def _messages(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if isinstance(messages := body.get("messages"), list) and messages:
        return tuple(messages)
    return ({"role": "user", "content": str(body["prompt"])},)
