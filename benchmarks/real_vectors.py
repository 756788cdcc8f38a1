"""``python -m benchmarks.real_vectors --uri FOLDER.db --out FILE.parquet``: the vectors that ``data embed`` wrote.

Columns ``id`` and ``vector``: what ``data bench vectors=FILE.parquet`` and ``benchmarks.search_server`` take.
"""

from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from data_pipelines.bench_search import open_target
from workbench.config import environment

PAGE = 2_000


def main(
    uri: Annotated[str, typer.Option(help="Milvus Lite folder, or http://HOST:19530")],
    out: Annotated[Path, typer.Option(help="the Parquet file to write")],
    collection: Annotated[str, typer.Option(help="its name")] = "documents",
) -> None:
    """Read page by page, and write what was read once all is there."""
    pages = []
    with open_target(uri, environment("MILVUS_TOKEN") or "") as target, target.client() as client:
        client.load_collection(collection)
        iterator = client.query_iterator(collection, batch_size=PAGE, output_fields=["id", "vector"])
        while rows := iterator.next():
            vectors = [row["vector"] for row in rows]
            kind = pa.list_(pa.float32(), len(vectors[0]))
            pages.append(pa.table({"id": [row["id"] for row in rows], "vector": pa.array(vectors, kind)}))
        iterator.close()
    table = pa.concat_tables(pages)
    part = out.with_suffix(".part")
    pq.write_table(table, part)
    part.rename(out)
    print(f"{table.num_rows:,} vectors of {table['vector'].type.list_size} dimensions in {out}")


if __name__ == "__main__":
    typer.run(main)
