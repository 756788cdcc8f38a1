"""Rows that are tokenized while the cards train: Ray Data does it on any host with CPUs to spare, a little ahead.

    stream = open_stream(file, recipe, deal, known=vocabulary, ledger=run.artifact("stream.jsonl"))
    batches = StreamedBatches(stream)          # on every rank: the same batches as of rows that lie ready
    batches[step]

One actor, on the host of the driver, runs the pipeline: conversations are read there in the order of the epoch, travel
through Ray to whichever host tokenizes them (it needs to see no file), and come back in that order. The actor deals the
batches (``stream_dealer.py``) and keeps the last few. Ray Data holds at most ``AHEAD_BYTES`` that nobody has asked for.
"""

import json
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from workbench.errors import UserError
from workloads.chat_templates import load_tokenizer
from workloads.conversations import conversation_of
from workloads.encoding import Counts, Encoded, Recipe, encode_each
from workloads.stream_dealer import Part, StreamDealer, Told
from workloads.tokenized import SCHEMA, as_arrow, check_known, quiet_ray_data
from workloads.training.batches import Row
from workloads.training.dealing import Deal

ROWS_OF_A_TASK = 256
NODE = "ray.io/node-id"
"""A label that Ray gives to every node."""
AHEAD_BYTES = 256 << 20
"""Of text and tokens that Ray Data may hold in the object store."""


class RowStream:
    """The actor. ``known`` is the number of tokens that the model knows."""

    def __init__(self, file: Path, recipe: Recipe, deal: Deal, known: int, ledger: Path) -> None:
        import ray

        self._file, self._recipe, self._known = file, recipe, known
        self._starts = _line_starts(file)
        self._tokenizer = ray.put(load_tokenizer(recipe.base, recipe.chat_template))
        self._dealer = StreamDealer(len(self._starts), deal, self._tokenized, ledger)
        self._hosts = Counter[str]()

    def batch(self, step: int) -> list[Row] | str:
        """The batch of ``step``, or why there is none: as an exception that would come back wrapped in Ray's."""
        try:
            return self._dealer.batch(step)
        except UserError as error:
            return str(error)

    def sources(self, step: int) -> tuple[str, ...]:
        """The documents of the batch of ``step``."""
        return self._dealer.sources(step)

    def told(self) -> tuple[Told, dict[str, int]]:
        """What has become of the rows, and how many each host has tokenized for this actor."""
        return self._dealer.told(), dict(self._hosts)

    def _tokenized(self, numbers: Sequence[int]) -> Iterator[Part]:
        """The rows of these numbers, by Ray Data. Raises UserError for one that cannot be trained on."""
        import ray
        from ray.data import ExecutionResources

        if not numbers:
            return
        parts = [numbers[start : start + ROWS_OF_A_TASK] for start in range(0, len(numbers), ROWS_OF_A_TASK)]
        items = [{"starts": [int(self._starts[number]) for number in part]} for part in parts]
        file, tokenizer, recipe = self._file, self._tokenizer, self._recipe

        def read(item: dict[str, Any]) -> dict[str, Any]:
            with file.open("rb") as stream:
                return {"lines": [stream.readline() for start in item["starts"] if stream.seek(start) >= 0]}

        def tokenize(item: dict[str, Any]) -> dict[str, Any]:
            return tokenize_lines([bytes(line) for line in item["lines"]], recipe, _kept(tokenizer))

        context = quiet_ray_data()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
        here = {NODE: ray.get_runtime_context().get_node_id()}
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        for made in dataset.map(read, num_cpus=0, label_selector=here).map(tokenize).iter_rows():
            if made["refused"]:
                raise UserError(made["refused"])
            counts = [Counts(*map(int, each)) for each in np.asarray(made["counts"]).reshape(-1, len(fields(Counts)))]
            check_known(recipe.base, max(count.largest_id for count in counts), self._known)
            self._hosts[made["host"]] += len(counts)
            yield pa.ipc.open_stream(made["rows"]).read_next_batch(), counts


def tokenize_lines(lines: Sequence[bytes], recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """The rows of these lines in Arrow's stream format, and what became of each line; ``refused`` says why not."""
    encoded: Encoded = []
    refused = ""
    try:
        encoded = encode_each([conversation_of(json.loads(line)) for line in lines], tokenizer, recipe)
    except UserError as error:
        refused = str(error)
    known = {place: counts for place, _, counts in encoded}
    counts = [astuple(known.get(place, Counts(rows_dropped=1))) for place in range(len(lines))]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(as_arrow([row for _, row, _ in encoded], [place for place, *_ in encoded]))
    return {
        "rows": sink.getvalue().to_pybytes(), "counts": np.asarray(counts, np.int64).ravel(), "refused": refused,
        "host": socket.gethostname(),
    }  # fmt: skip


@cache
def _kept(reference: Any) -> Any:
    """The object of ``reference``, fetched once by a process that runs many tasks."""
    import ray

    return ray.get(reference)


def _line_starts(file: Path) -> np.ndarray:
    """Where each line of ``file`` begins."""
    starts, start = [], 0
    with file.open("rb") as stream:
        for line in stream:
            starts.append(start)
            start += len(line)
    return np.asarray(starts, np.int64)


class StreamedBatches:
    """Batches that the actor makes; the next one is asked for while this one is trained on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._asked: dict[int, Any] = {}

    def __getitem__(self, step: int) -> list[Row]:
        import ray

        made = ray.get(self._asked.pop(step, None) or self._stream.batch.remote(step))
        if isinstance(made, str):
            raise UserError(made)
        self._asked = {step + 1: self._stream.batch.remote(step + 1)}
        rows: list[Row] = made
        return rows

    def sources(self, step: int) -> tuple[str, ...]:
        """The documents of the batch of ``step``."""
        import ray

        named: tuple[str, ...] = ray.get(self._stream.sources.remote(step))
        return named


def open_stream(file: Path, recipe: Recipe, deal: Deal, *, known: int, ledger: Path) -> Any:
    """The actor that streams the conversations of ``file``; it comes back by itself if its process dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RowStream).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)
    return actor.remote(file, recipe, deal, known, ledger)


def check_room(cpus: float, workers: int) -> None:
    """Raise UserError where ``workers`` of ``cpus`` CPUs each leave none that rows can be tokenized on."""
    from cluster.nodes import member_nodes

    every = sum(node.total.get("CPU", 0.0) for node in member_nodes())
    if every - workers * cpus < 1:
        raise UserError(
            f"streaming tokenizes rows on CPUs that the workers leave free, and {workers} of {cpus:g} CPUs leave "
            f"{max(0.0, every - workers * cpus):g} of {every:g}: give a smaller cpus_per_worker, or streaming=false"
        )
