"""``python -m benchmarks.train_speed --append docs/benchmarks.md``: fine-tuning beside TRL and Transformers' Trainer.

The same random Llama, adapter, rows, batch, optimizer and number type; every side in turn, in a process of its own,
once in each round; without packing and with it. Counted are tokens that are no padding, in all steps but the first. TRL
is measured as it comes, and with the setting that suits these rows best: batches of like lengths, or packed sequences
one by one, because it joins those of a batch into one. With a CUDA card the same in bfloat16 on it, with model FLOP
utilisation, and Unsloth where it is installed; ``--layers`` and the others then make a model worth a card.
"""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.machine import heading, table, write_down
from benchmarks.train_rows import Sizes, described, make
from benchmarks.train_sides import Specification
from workbench.config import runs_root
from workbench.errors import Failure
from workbench.files import read_json, write_json
from workloads.training.adapters import add_adapter, empty_model
from workloads.training.batches import Batches, Row
from workloads.training.config import AdapterConfig
from workloads.training.throughput import attention_flops, head_flops, peak_flops, step_flops, weight_flops

SIDES = {
    "plain": ("workbench", "trl", "trl, grouped by length", "transformers"),
    "packed": ("workbench", "workbench, one by one", "trl", "trl, one by one", "transformers"),
}
"""Transformers' Trainer has no packing: it is given our sequences."""
TITLES = {"plain": "One row a sequence", "packed": "Packed"}

Measured = dict[str, float]


def measure(given: Specification) -> Measured:
    """What ``given`` measured in a process of its own. Raises Failure with the end of its output."""
    file = Path(given.folder) / "side.json"
    file.write_text(json.dumps(asdict(given)))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.train_sides", str(file)]
    done = subprocess.run(
        command, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise Failure(f"{given.side} ended with {done.returncode}: {done.stdout[-600:]}")
    found: Measured = read_json(file.with_suffix(".result"))
    return found


def turns(
    every: Specification, asked: Mapping[str, Sequence[str]], rows: Sequence[Row], counted: bool
) -> Iterator[Specification]:
    """Each side once: all rows, or where bytes are counted one step after the first ones."""
    for kind, sides in asked.items():
        epoch = Batches(rows, every.batch, 0, every.max_length if kind == "packed" else 0).first_epoch()
        steps = every.warm + 1 if counted else len(epoch)
        for side in sides:
            yield replace(every, side=side, packing=kind == "packed", steps=steps, count=counted)


def rates(rounds: Sequence[Measured], clock: str = "seconds") -> list[float]:
    """Tokens a second of each round."""
    return [measured["tokens"] / measured[clock] for measured in rounds]


def flops_per_token(model: Any, rows: Sequence[Row]) -> float:
    """Operations that training on a token of ``rows`` needs; what a side computes beyond them is not counted."""
    costs = weight_flops(model), attention_flops(model), head_flops(model)
    return step_flops(rows, *costs) / sum(len(row.ids) for row in rows)


def lines(
    measured: dict[str, list[Measured]], counted: dict[str, Measured], utilisation: float | None
) -> list[dict[str, Any]]:
    """The rows of a table; ``utilisation`` is that of one token a second, None where it is not known."""
    usual = {side: statistics.median(rates(rounds)) for side, rounds in measured.items()}
    found, compared = [], "workbench" in usual
    for side, rounds in measured.items():
        row = {
            "": side,
            "tokens/s, median": f"{usual[side]:,.0f}",
            "spread": f"{min(rates(rounds)):,.0f} to {max(rates(rounds)):,.0f}",
            "a CPU second": f"{statistics.median(rates(rounds, 'cpu_seconds')):,.0f}",
            "ours is faster by": f"{usual['workbench'] / usual[side]:.2f}" if compared and side != "workbench" else "",
            "peak memory, GB": f"{max(each['memory'] for each in rounds) / 1e9:.2f}",
            "tensors of a step, GB": f"{counted[side]['counted'] / 1e9:.2f}" if side in counted else "",
        }
        if utilisation is not None:
            row["model FLOP utilisation"] = f"{usual[side] * utilisation:.1%}"
        found.append(row)
    return found


def described_run(given: Specification, model: Any, rows: Sequence[Row], rounds: int) -> str:
    """What was trained, in a paragraph."""
    weights = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name) / 1e6
    config = model.config
    return (
        f"\n`python -m benchmarks.train_speed`: a Llama of {weights:.1f} million weights ({config.num_hidden_layers} "
        f"layers, hidden {config.hidden_size}, vocabulary {config.vocab_size:,}), "
        f"{'LoRA of rank 16 on all linear layers' if given.method == 'lora' else 'all weights trained'}, "
        f"{given.config.compute_dtype}, AdamW, SDPA attention, activations "
        f"{'recomputed' if given.recompute else 'kept'}{', compiled' if given.compile else ''}; {given.batch} "
        f"sequences of up to {given.max_length} tokens a step; "
        f"{described(rows)}, each trained on once. Every side in turn, {rounds} rounds; the first {given.warm} steps "
        f"are left out. {torch.get_num_threads()} threads"
        f"{f', {torch.cuda.get_device_name(0)}' if torch.cuda.is_available() else ''}.\n"
    )


def main(
    rounds: Annotated[int, typer.Option(help="each side once in each")] = 3,
    rows: Annotated[int, typer.Option(help="of the standard library's functions; all are trained on once")] = 192,
    batch: Annotated[int, typer.Option(help="sequences of a step")] = 4,
    max_length: Annotated[int, typer.Option(help="tokens of a sequence at most")] = 512,
    layers: Annotated[int, typer.Option(help="of the model; and so on")] = Sizes.layers,
    hidden: int = Sizes.hidden,
    intermediate: int = Sizes.intermediate,
    vocabulary: int = Sizes.vocabulary,
    heads: int = Sizes.heads,
    warm: Annotated[int, typer.Option(help="first steps that are not counted")] = 2,
    method: Annotated[Literal["lora", "full"], typer.Option(help="an adapter of rank 16, or all weights")] = "lora",
    recompute: Annotated[bool, typer.Option(help="activations, in the backward pass")] = False,
    compiled: Annotated[bool, typer.Option(help="as each side compiles; give --warm 5 or more")] = False,
    count: Annotated[bool, typer.Option(help="count a step's tensor bytes, in a run that is not timed")] = True,
    only: Annotated[Literal["both", "plain", "packed"], typer.Option(help="one of the tables")] = "both",
    resume: Annotated[bool, typer.Option(help="count the rounds of earlier calls, too")] = False,
    folder: Annotated[Path | None, typer.Option(help="where model, rows and results stay")] = None,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure in turn, and print tokens per second and peak memory."""
    folder = (folder or runs_root() / "bench-train").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    made = make(folder, Sizes(layers, hidden, intermediate, vocabulary, heads), rows, max_length)
    every = Specification("", str(folder), warm + 1, warm, batch, max_length, False, method, recompute, compiled, False)
    kept = folder / "results.json"
    of = {"model": asdict(Sizes(layers, hidden, intermediate, vocabulary, heads)), "rows": rows, "run": asdict(every)}
    results: dict[str, Any] = read_json(kept) if resume and kept.exists() else {"of": of}
    if results.get("of") != of:
        raise typer.BadParameter(f"{kept} is of other sizes: give those, or another --folder", param_hint="--resume")
    timed, counted = (results.setdefault(name, {"plain": {}, "packed": {}}) for name in ("timed", "counted"))
    unsloth = ["unsloth"] if torch.cuda.is_available() and importlib.util.find_spec("unsloth") else []
    asked = {kind: (*sides, *unsloth) for kind, sides in SIDES.items() if only in ("both", kind)}
    lacking = {}
    for turn in range(rounds + count):
        for given in turns(every, asked, made, counted=turn == rounds):
            kind = "packed" if given.packing else "plain"
            try:
                measured = measure(given)
            except Failure as failure:
                lacking[kind, given.side] = str(failure)
                continue
            if given.count:
                counted[kind][given.side] = measured
            else:
                timed[kind].setdefault(given.side, []).append(measured)
                print(f"round {turn + 1}, {kind}: {given.side} {rates([measured])[0]:,.0f} tokens/s", flush=True)
            write_json(kept, results)

    model = empty_model(str(folder / "base"))
    model = add_adapter(model, AdapterConfig()) if method == "lora" else model
    peak = peak_flops(torch.device("cuda", 0), "bfloat16") if torch.cuda.is_available() else None
    packages = ["torch", "transformers", "peft", "trl", *unsloth]
    text = heading("Fine-tuning beside TRL and Transformers", packages)
    text += described_run(
        every, model, made, max((len(sides) for kind in asked for sides in timed[kind].values()), default=0)
    )
    for kind in asked:
        utilisation = flops_per_token(model, made) / peak if peak else None
        rows_of = lines(timed[kind], counted[kind], utilisation)
        text += f"\n{TITLES[kind]}:\n\n{table(rows_of) if rows_of else 'no side was measured'}"
    text += "".join(f"\nNot measured: {why}\n" for why in lacking.values())
    write_down(text, append)


if __name__ == "__main__":
    typer.run(main)
