"""The Ray Data pipeline of ``data embed``: read chosen rows; embed and write them in a pool of workers.

The workers write through our sink themselves. As a step of its own, its tasks would each start a process, for Ray ends
one that has been idle for a second; and a worker that waits for its own write is all the back pressure that is needed.
"""

import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import pyarrow.dataset as ds
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayError

from cluster.placement import Placement
from data_pipelines.chosen import ChosenRows
from data_pipelines.collection import Collection
from data_pipelines.embedding import EmbedIntoMilvus, ModelPlace
from data_pipelines.owner import root_cause
from data_pipelines.selection import Wanted
from data_pipelines.sink import MilvusDatasink, Progress
from data_pipelines.sources import quiet_progress
from workbench.config import environment, runs_root
from workbench.runs import Run

if TYPE_CHECKING:
    from data_pipelines.embed import EmbedConfig

SPEAK_SECONDS = 2.0


def embed_into(
    config: "EmbedConfig",
    collection: Collection,
    place: ModelPlace,
    wanted: Wanted,
    todo: list[str],
    placement: Placement,
    run: Run,
) -> dict[str, int]:
    """Embed and write the documents ``todo``; what was counted: ``documents`` written, texts ``cut``.

    Raises Failure if Milvus takes no write any more.
    """
    quiet_progress()
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # of a step with few blocks
    files = ds.dataset(str(config.documents), format="parquet").files
    source = ChosenRows(
        files, wanted.columns, ray.put(np.array(todo)), shared=config.documents.is_relative_to(runs_root())
    )
    progress = Progress.remote()  # type: ignore[attr-defined]
    sink = MilvusDatasink(
        config.uri, collection, environment("MILVUS_TOKEN") or "", patience=config.patience, progress=progress
    )
    # Two writes a batch where there are many, so that one is under way while the model works on the next.
    writes = 2 if len(todo) > 8 * config.workers * config.batch_size else 1
    rows = writes * config.batch_size
    dataset = (
        # Reading is nothing beside embedding, and must not wait for the CPUs that the workers hold.
        ray.data.read_datasource(
            source, override_num_blocks=source.tasks, num_cpus=0, compute=TaskPoolStrategy(size=config.workers)
        ).map_batches(
            EmbedIntoMilvus,
            fn_constructor_kwargs={
                "sink": sink,
                "step": config.batch_size,
                "place": place,
                "recipe": config.recipe(),
                "progress": progress,
            },
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(config.workers, -(-len(todo) // rows))),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            **placement.data_options(),
        )
    )
    # A worker's rows come out when its block is done: a block that is read is about one batch.
    dataset.context.target_max_block_size = rows * wanted.row_bytes
    watch = _Watch(progress, len(todo), run)
    try:
        for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            pass
    except RayError as error:
        raise root_cause(error) from None
    finally:
        counts = watch.end()
    return counts


class _Watch:
    """Tells every few seconds what Milvus has taken, and draws it in the report at the end."""

    def __init__(self, progress: Any, total: int, run: Run) -> None:
        self._progress, self._total, self._run = progress, total, run
        self._began = time.monotonic()
        self._seconds, self._written = [0.0], [0]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="embed-progress", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(SPEAK_SECONDS):
            self._tell(ray.get(self._progress.counts.remote()).get("documents", 0))

    def _tell(self, done: int) -> None:
        if done == self._written[-1]:
            return
        seconds = time.monotonic() - self._began
        self._seconds.append(seconds)
        self._written.append(done)
        self._run.say(f"{done:,} of {self._total:,} embedded, {done / seconds:.1f} a second")
        self._run.metrics(done, embedded=done, documents_per_second=done / seconds)

    def end(self) -> dict[str, int]:
        """Stop, tell the last, draw; what was counted."""
        self._ended.set()
        self._thread.join()
        counts: dict[str, int] = ray.get(self._progress.counts.remote())
        self._tell(counts.get("documents", 0))
        figure = go.Figure(go.Scatter(x=self._seconds, y=self._written, mode="lines+markers"))
        figure.update_xaxes(title="seconds").update_yaxes(title="documents in Milvus")
        self._run.report.figure("Progress", figure, note="the first seconds are the workers loading the model")
        return counts
