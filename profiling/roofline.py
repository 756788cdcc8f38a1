"""``workbench profile roofline``: how fast a model could be on a device, and how fast it is.

    workbench profile roofline model=runs/train-pretrain/latest/artifacts/model resources="{gpu: rtx-5090}"

The roof is of two measured figures, the rate of matrix products and the bandwidth of memory (Williams et al. 2009,
doi:10.1145/1498765.1498785). Under it are the least work of a prefill, a decode step and a training step, and what
Transformers took for them here with random weights; and, with ``train_run``, what a training run reached.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cluster.placement import place_here
from profiling.model_work import ModelShape, Work, read_shape
from profiling.reasons import reason
from workbench.config import InputPath
from workbench.errors import Failure, UserError
from workbench.resources import Placed
from workbench.run_records import Record
from workbench.runs import Run, Summary
from workbench.tracking import read_metrics

if TYPE_CHECKING:
    import plotly.graph_objects as go

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RooflineConfig(Placed):
    """Which model, where, and at which sizes."""

    model: InputPath = Field(description="folder with the model's config.json; weights are not read")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of weights, cache and products")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs to reserve")
    gpus_per_worker: float = Field(0.0, ge=0, le=1, description="cards to reserve; or use resources")
    prompt: int = Field(512, ge=1, description="tokens of a prefill, and behind each decoded token")
    decode: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 8, 64], min_length=1, description="sequences that are decoded at once"
    )
    train_sequences: int = Field(4, ge=1, description="sequences of a training step, of 'prompt' tokens each")
    matrix: int = Field(8192, ge=64, description="rows and columns of the products that are timed")
    buffer: int = Field(1 << 30, ge=1 << 16, description="bytes of the buffer that is copied")
    rounds: int = Field(5, ge=1, description="medians and spread are over these")
    train_run: InputPath | None = Field(None, description="run folder of a training of this model, for its rate")


def run(config: RooflineConfig, run: Run) -> Summary:
    """Measure the roof and the model on one worker. Raises UserError for a model that is none, Failure where the
    worker fails or dies."""
    import ray

    shape, _ = read_shape(config.model, BYTES[config.dtype])
    if shape.quantised and config.train_run is not None:
        raise UserError(
            "train_run: the work of a training over quantised weights is not known here: leave train_run out, or give "
            "as model the config without quantization_config"
        )
    placement = place_here(config.request(), run.say)
    task = ray.remote(max_retries=0)(measure_device).options(**placement.options())
    try:
        measured = ray.get(task.remote(config.model_dump(mode="json")))
    except ray.exceptions.RayError as error:
        raise Failure(f"the measurement ended: {reason(error)}") from None
    rate, bandwidth = measured["operations_per_second"], measured["bytes_per_second"]
    run.say(f"{measured['device']}: {rate / 1e12:.3f} TFLOP/s in {config.dtype}, {bandwidth / 1e9:.1f} GB/s")
    rows = [
        row_of(name, work, measured["seconds"].get(name), rate, bandwidth)
        for name, work in works(config, shape).items()
    ]
    if config.train_run is not None:
        rows.append(_of_run(config, shape, rate, bandwidth))
    note = f"{measured['device']}, {config.dtype}; {shape.all_weights / 1e6:,.1f} million weights. Both roofs measured."
    if shape.quantised:
        note += f" Weights of {8 * shape.weight_bytes:g} bits: limits alone, of prefill and decode."
    run.report.figure("Roofline", roofline(rows, rate, bandwidth), note=note)
    run.report.table("Work, limit and measurement", rows, note="Limit: no faster by these two figures of the device.")
    return {
        "device": measured["device"],
        "tflops": round(rate / 1e12, 4),
        "gb_per_s": round(bandwidth / 1e9, 2),
        "ridge_operations_per_byte": round(rate / bandwidth, 1),
        **{f"{row['work']} percent of the limit": row["percent_of_limit"] for row in rows},
    }


def works(config: RooflineConfig, shape: ModelShape) -> dict[str, Work]:
    """What is drawn, by name; of quantised weights, which AdamW does not train, no training step."""
    decoded = {f"decode x{count}": shape.decode(count, config.prompt) for count in config.decode}
    found = {"prefill": shape.prefill(1, config.prompt), **decoded}
    if shape.quantised:
        return found
    return {**found, "training step": shape.training(config.train_sequences, config.prompt)}


def row_of(name: str, work: Work, seconds: float | None, rate: float, bandwidth: float) -> dict[str, Any]:
    """One line: what is needed, the limit, what was measured, and which of the two bounds it."""
    limit = work.seconds_at(rate, bandwidth)
    return {
        "work": name,
        "gflop": work.operations / 1e9,
        "mb": work.bytes / 1e6,
        "operations_per_byte": work.intensity,
        "bound_by": "memory" if work.bytes / bandwidth > work.operations / rate else "matrix rate",
        "limit_ms": limit * 1e3,
        "measured_ms": None if seconds is None else seconds * 1e3,
        "percent_of_limit": None if seconds is None else round(100 * limit / seconds, 1),
    }


def _of_run(config: RooflineConfig, shape: ModelShape, rate: float, bandwidth: float) -> dict[str, Any]:
    """The training step again, as long as one of the run's workers took for as many tokens."""
    assert config.train_run is not None
    rates = [row["tokens_per_second"] for row in read_metrics(config.train_run) if row.get("tokens_per_second")]
    if not rates:
        raise UserError(f"train_run: {config.train_run} has no tokens_per_second in its metrics: give a training's run")
    workers = Record.read(config.train_run).config.get("workers") or 1
    seconds = config.train_sequences * config.prompt * workers / float(np.median(rates))  # the rate is of all of them
    work = shape.training(config.train_sequences, config.prompt)
    return row_of("training step of the run", work, seconds, rate, bandwidth)


def measure_device(keys: dict[str, Any]) -> dict[str, Any]:
    """The roof of this worker's device, and the seconds of each work on it; a Ray task."""
    import torch

    config = RooflineConfig.model_construct(**{**keys, "model": Path(keys["model"])})
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    product, copied = _measure_roof(config, device, dtype)
    return {
        "device": _name(device),
        "operations_per_second": 2.0 * config.matrix**3 / product,
        "bytes_per_second": 2.0 * config.buffer / copied,  # each byte is read and written
        "seconds": _measure_model(config, device, dtype),
    }


def _name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name())
    return "the Mac's GPU" if device.type == "mps" else f"{torch.get_num_threads()} CPU threads"


def _measure_roof(config: RooflineConfig, device: Any, dtype: Any) -> tuple[float, float]:
    """Seconds of a product of two square matrices, and of a copy within memory."""
    import torch

    a, b = (torch.randn(config.matrix, config.matrix, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(config.buffer, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        _median(lambda: a @ b, device, config.rounds),
        _median(lambda: target.copy_(source), device, config.rounds),
    )


def _measure_model(config: RooflineConfig, device: Any, dtype: Any) -> dict[str, float]:
    """Seconds of each work with random weights; what does not fit is left out, and all of it where the weights are
    quantised: random ones are not."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    shape, made = read_shape(config.model, BYTES[config.dtype])
    seconds: dict[str, float] = {}
    if shape.quantised:
        return seconds
    most = max(*config.decode, config.train_sequences)  # each sequence of its own tokens, which draw their own experts
    ids = torch.randint(0, made.get_text_config(decoder=True).vocab_size, (most, config.prompt), device=device)
    try:
        with device:
            model: Any = AutoModelForCausalLM.from_config(made, dtype=dtype)
        model.eval()
        with torch.no_grad():
            seconds["prefill"] = _median(lambda: model(ids[:1], logits_to_keep=1), device, config.rounds)
            for count in config.decode:
                cache = DynamicCache(config=made)
                model(ids[:count], past_key_values=cache, use_cache=True, logits_to_keep=1)
                last = ids[:count, :1]

                def step(cache: Any = cache, last: Any = last) -> None:
                    model(last, past_key_values=cache, use_cache=True)
                    cache.crop(-1)

                seconds[f"decode x{count}"] = _median(step, device, config.rounds)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
        rows = ids[: config.train_sequences]

        def train() -> None:
            model(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds["training step"] = _median(train, device, config.rounds)
    except torch.OutOfMemoryError:
        return seconds
    return seconds


def _median(work: Any, device: Any, rounds: int) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()

    work()
    wait()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def roofline(rows: list[dict[str, Any]], rate: float, bandwidth: float) -> "go.Figure":
    """Operations a second over operations a byte: the roof, and each work on it and where it was measured."""
    import plotly.graph_objects as go

    intensities = [row["operations_per_byte"] for row in rows]
    axis = np.geomspace(min([*intensities, rate / bandwidth]) / 4, max([*intensities, rate / bandwidth]) * 4, 200)
    figure = go.Figure()
    figure.add_scatter(x=axis, y=np.minimum(rate, axis * bandwidth) / 1e9, mode="lines", name="the roof, measured")
    figure.add_scatter(
        x=intensities, y=[row["gflop"] / row["limit_ms"] * 1e3 for row in rows], mode="markers+text", name="limit",
        text=[row["work"] for row in rows], textposition="top left", marker={"symbol": "circle-open", "size": 10},
    )  # fmt: skip
    known = [row for row in rows if row["measured_ms"]]
    figure.add_scatter(
        x=[row["operations_per_byte"] for row in known], y=[row["gflop"] / row["measured_ms"] * 1e3 for row in known],
        mode="markers", name="measured", marker={"size": 10},
        text=[f"{row['work']}: {row['percent_of_limit']:.0f}% of the limit" for row in known],
    )  # fmt: skip
    figure.update_xaxes(type="log", title="operations a byte")
    figure.update_yaxes(type="log", title="GFLOP/s")
    return figure
