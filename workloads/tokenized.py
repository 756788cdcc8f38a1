"""Conversations as token rows on disk, made once for all workers, trials and later runs, and read memory-mapped.

    folder = tokenize(run.artifact("train.jsonl"), recipe, cache_folder())
    rows = TokenRows(folder)

A set of rows is a folder named by what it was made from: the content of the file, the tokenizer with its template, and
how rows are cut. It has Arrow files of ``ids`` and ``learned`` (lists of one length), ``source`` and ``place`` (the
row's number in its part of the file: those that teach nothing are left out), in the order of the file, and
``counts.json``. Many rows are tokenized by Ray Data, on whichever hosts have CPUs to spare; they see the
runs root, as all hosts of a cluster do.
"""

import bisect
import hashlib
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from workbench.config import runs_root
from workbench.errors import UserError
from workbench.files import fingerprint, read_json, write_json
from workloads.chat_templates import load_tokenizer
from workloads.conversations import read_conversations
from workloads.encoding import Counts, Recipe, encode_each, total
from workloads.preferences import encode_preferences, read_preferences
from workloads.training.batches import IGNORE, MadeRows, Row

LAYOUT = 4
"""Changed with what a set of rows holds, or how it comes about: older sets are then not found any more."""
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.uint8())),
        ("source", pa.string()),
        ("place", pa.int64()),
    ]
)
ROWS_AT_ONCE = 256
SHARD_BYTES = 8 << 20
"""Of the file of conversations: what one task of Ray Data tokenizes. A smaller file is not worth the tasks."""
UNUSED_DAYS = 30
"""After which a set of rows is removed."""


def cache_folder() -> Path:
    """Where sets of rows are kept: below the runs root, which all hosts of a cluster share."""
    return runs_root() / "cache" / "tokens"


def tokenize(file: Path, recipe: Recipe, cache: Path, *, spread: bool = False) -> Path:
    """The folder of the rows of ``file``, made if ``cache`` lacks it; with ``spread`` by Ray Data where it is large.

    Raises UserError for a tokenizer, template or conversation that cannot be used.
    """
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    folder = cache / _key(file, recipe, tokenizer)
    if (folder / "counts.json").is_file():
        os.utime(folder)
        return folder
    _remove_unused(cache)
    partial = cache / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir(parents=True)
    try:
        ranges = list(_ranges(file))
        if spread and len(ranges) > 1:
            counts = _by_ray_data(file, ranges, recipe, tokenizer, partial)
        else:
            whole = (0, file.stat().st_size)
            counts = [tokenize_range(file, whole, recipe, tokenizer, partial / "part-00000.arrow")]
        shards = [each.rows + each.rows_dropped for each in counts]
        write_json(partial / "counts.json", {"all": asdict(sum(counts, Counts())), "read": shards})
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "counts.json").is_file():  # otherwise another trial has made the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def tokenize_range(file: Path, between: tuple[int, int], recipe: Recipe, tokenizer: Any, shard: Path) -> Counts:
    """Write the rows of the bytes ``between`` of ``file`` to ``shard``, whole or not at all."""
    counts, read = Counts(), 0
    partial = shard.with_name(f".{shard.name}.{uuid.uuid4().hex[:8]}.partial")
    with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as writer:
        rows: Iterator[Any] = (read_preferences if recipe.pairs else read_conversations)(file, *between)
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            if recipe.pairs:
                made, what = encode_preferences(some, tokenizer, recipe)
                places: Sequence[int] = range(len(made))
            else:
                encoded = encode_each(some, tokenizer, recipe)
                made, what = [row for _, row, _ in encoded], total(encoded, len(some))
                places = [read + number for number, *_ in encoded]
            counts, read = counts + what, read + len(some)
            writer.write_batch(as_arrow(made, places))
    partial.rename(shard)
    return counts


class TokenRows(MadeRows):
    """The rows of a folder that ``tokenize`` made. They stay on disk: a rank holds its batch and the lengths.

    ``places`` are those of the rows among the ``read`` ones of the file, some of which may have been left out.
    """

    def __init__(self, folder: Path) -> None:
        known = read_json(folder / "counts.json")
        self.counts, self.read = Counts(**known["all"]), sum(known["read"])
        self._batches: list[pa.RecordBatch] = []
        places = []
        before = itertools.accumulate(known["read"], initial=0)
        for shard, first in zip(sorted(folder.glob("part-*.arrow")), before, strict=False):
            reader = pa.ipc.open_file(pa.memory_map(str(shard)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            places += [first + batch.column("place").to_numpy() for batch in batches]
            self._batches += batches
        self.places: Sequence[int] = np.concatenate(places).tolist() if places else []
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))
        offsets = [batch.column("ids").offsets.to_numpy() for batch in self._batches]
        self.lengths: Sequence[int] = np.concatenate([np.diff(each) for each in offsets]).tolist() if offsets else []

    def row(self, place: int) -> Row:
        """The row at ``place``, from 0."""
        number = bisect.bisect_right(self._ends, place)
        batch = self._batches[number]
        return row_of(batch, place - (self._ends[number] - batch.num_rows))


def row_of(batch: pa.RecordBatch, within: int) -> Row:
    """The row at ``within`` in a batch of SCHEMA."""
    ids = batch.column("ids")[within].values.to_numpy()
    learned = batch.column("learned")[within].values.to_numpy()
    labels = np.where(learned, ids, IGNORE)
    return Row(ids.tolist(), labels.tolist(), (batch.column("source")[within].as_py(),))


def check_known(base: str, largest: int, known: int) -> None:
    """Raise UserError for the token ``largest`` that the tokenizer of ``base`` makes for a model that knows ``known``
    tokens."""
    if largest >= known:
        raise UserError(
            f"the tokenizer of {base} makes token {largest} of these rows, and the model knows {known} tokens, 0 to "
            f"{known - 1}: the tokenizer belongs to another model, or was given tokens after the model was made"
        )


def _key(file: Path, recipe: Recipe, tokenizer: Any) -> str:
    tokens = tokenizer.backend_tokenizer.to_str() + tokenizer.get_chat_template()
    special = sorted(tokenizer.special_tokens_map.items())
    parts = (LAYOUT, fingerprint(file), tokens, special, recipe.max_length, recipe.train_on, recipe.pairs)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def as_arrow(rows: Sequence[Row], places: Sequence[int]) -> pa.RecordBatch:
    """``rows`` as a batch of SCHEMA."""
    offsets = pa.array(np.cumsum([0, *(len(row.ids) for row in rows)]), pa.int32())
    ids = np.fromiter(itertools.chain.from_iterable(row.ids for row in rows), np.int32)
    labels = np.fromiter(itertools.chain.from_iterable(row.labels for row in rows), np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array((labels != IGNORE).astype(np.uint8))),
        pa.array([row.sources[0] for row in rows], pa.string()),
        pa.array(places, pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _ranges(file: Path) -> Iterator[tuple[int, int]]:
    """Bytes ``[start, end)`` of about ``SHARD_BYTES`` that begin and end with a line."""
    size, start = file.stat().st_size, 0
    with file.open("rb") as stream:
        while start < size:
            stream.seek(min(size, start + SHARD_BYTES))
            stream.readline()
            yield start, stream.tell()
            start = stream.tell()


def quiet_ray_data() -> Any:
    """Ray Data's context of this process, without progress bars."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # tells that the bars are off
    return context


def _by_ray_data(
    file: Path, ranges: Sequence[tuple[int, int]], recipe: Recipe, tokenizer: Any, folder: Path
) -> list[Counts]:
    """A task and a shard for each range: one that is run twice, because its host died, writes the same."""
    import ray

    shared = ray.put(tokenizer)

    def tokenize_one(item: dict[str, Any]) -> dict[str, Any]:
        shard = folder / f"part-{item['number']:05d}.arrow"
        try:
            counts = tokenize_range(file, (item["start"], item["end"]), recipe, ray.get(shared), shard)
        except UserError as error:  # as an exception it would come back wrapped in those of Ray
            return {"refused": str(error), "number": item["number"], **asdict(Counts())}
        return {"refused": "", "number": item["number"], **asdict(counts)}

    items = [{"number": number, "start": start, "end": end} for number, (start, end) in enumerate(ranges)]
    quiet_ray_data()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(tokenize_one)
    shards: dict[int, Counts] = {}
    for made in dataset.iter_rows():
        if refused := made.pop("refused"):
            raise UserError(refused)
        number = made.pop("number")
        shards[number] = Counts(**made)
    return [shards[number] for number in sorted(shards)]


def _remove_unused(cache: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in cache.glob("*") if cache.is_dir() else ():
        if folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
