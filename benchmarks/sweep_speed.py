"""``python -m benchmarks.sweep_speed --append docs/benchmarks.md``: a sweep beside its trials as commands of their own.

The same points of the same random Llama and rows, all on one Ray that is up already, each side once in each round:
``tune run`` with one and with two trials at a time, and ``train sft`` of each point one after the other. Beside them
what a trial's set-up consists of, anew and as a sweep has it: the base loaded and quantised, the rows tokenised.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks.machine import heading, table, write_down
from benchmarks.train_rows import Sizes, functions, make
from tune.kept_base import KeptBase
from tune.study import SweepStudy
from workbench.config import runs_root
from workbench.errors import Failure
from workbench.files import read_json, write_json
from workbench.session import connect
from workloads.encoding import Recipe
from workloads.tokenized import tokenize
from workloads.training.adapters import load_base

SWEEPS = {"tune run, one trial at a time": 1, "tune run, two at a time": 2}
ALONE = "train sft, one after the other"

Round = dict[str, Any]


def workbench(arguments: Sequence[str], environment: dict[str, str]) -> float:
    """Run a command; its seconds. Raises Failure with the end of its output."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "workbench", *arguments], env=os.environ | environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Failure(f"workbench {arguments[0]} {arguments[1]} ended with {done.returncode}: {done.stdout[-600:]}")
    return time.monotonic() - began


def sweep(folder: Path, config: dict[str, Any], rates: Sequence[float], at_once: int, ray: dict[str, str]) -> Round:
    """One sweep over ``rates``: its seconds, and the set-up of each trial, the first of a process or a later one."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    space = {"learning_rate": {"choice": list(rates)}}
    rest = {"searcher": "grid", "concurrent": at_once, "budget": {"trials": len(rates)}, "scheduler": {"kind": "none"}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"config": config, "space": space, **rest}))
    seconds = workbench(
        ["tune", "run", str(folder / "sweep.yaml")], ray | {"WORKBENCH_RUNS_ROOT": str(folder / "runs")}
    )
    (run,) = (folder / "runs" / "tune-run").iterdir()
    trials = SweepStudy(run, {"validation_loss": "min"}).trials()
    if unfinished := [trial.number for trial in trials if trial.state != "finished"]:
        raise Failure(f"trials {unfinished} did not finish")
    setups = [trial.attempts[-1]["setup"] for trial in trials]
    return {"seconds": seconds, "first": setups[:at_once], "later": setups[at_once:]}


def alone(folder: Path, config: dict[str, Any], rates: Sequence[float], ray: dict[str, str]) -> Round:
    """``train sft`` of each rate in turn: the seconds of all."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump({"workers": 1, "strategy": "single", **config}))
    place = ray | {"WORKBENCH_RUNS_ROOT": str(folder / "runs")}
    return {"seconds": sum(
        workbench(["train", "sft", str(folder / "sft.yaml"), f"learning_rate={rate}"], place) for rate in rates
    )}  # fmt: skip


def timed(do: Callable[[], Any]) -> float:
    """Its seconds."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def parts(folder: Path, config: dict[str, Any]) -> Round:
    """What a set-up consists of, anew and as a sweep's later trials have it, in seconds."""
    torch.set_num_threads(1)
    how: Any = (config["base"], "float32", config["quantization"], torch.device("cpu"))
    kept = KeptBase()
    kept(*how)
    recipe = Recipe(config["base"], max_length=config["max_length"])
    rows, cache = folder / "prepared.jsonl", folder / "cache"
    lines = [json.loads(line) for line in Path(config["data"][0]).read_text().splitlines()]
    rows.write_text("".join(json.dumps({"id": str(number), **line}) + "\n" for number, line in enumerate(lines)))
    shutil.rmtree(cache, ignore_errors=True)
    return {
        "base anew": timed(lambda: load_base(*how)), "base kept": timed(lambda: kept(*how)),
        "rows anew": timed(lambda: tokenize(rows, recipe, cache)),
        "rows shared": timed(lambda: tokenize(rows, recipe, cache)),
    }  # fmt: skip


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and both ends where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def written(rounds: Sequence[Round], trials: int) -> str:
    """Both tables."""
    whole = [
        {"side": side, "rounds": len(rounds), "whole, s": spread([each[side]["seconds"] for each in rounds]),
         "a trial, s": spread([each[side]["seconds"] / trials for each in rounds]),
         "times as fast": spread([each[ALONE]["seconds"] / each[side]["seconds"] for each in rounds], 2),
         "set-up of a process' first trial, s": _all(rounds, side, "first"),
         "of a later one, s": _all(rounds, side, "later")}
        for side in (*SWEEPS, ALONE)
    ]  # fmt: skip
    pieces = [
        {"part of a set-up": what, "anew, s": spread([each["parts"][f"{name} anew"] for each in rounds], 3),
         "in a sweep, s": spread([each["parts"][f"{name} {how}"] for each in rounds], 3)}
        for what, name, how in (("the base, read and quantised", "base", "kept"), ("rows, tokenised", "rows", "shared"))
    ]  # fmt: skip
    return f"{table(whole)}\n{table(pieces)}"


def _all(rounds: Sequence[Round], side: str, which: str) -> str:
    values = [value for each in rounds for value in each[side].get(which, ())]
    return spread(values, 2) if values else "-"


def main(
    rounds: Annotated[int, typer.Option(help="each side once in each")] = 3,
    trials: Annotated[int, typer.Option(help="learning rates that are tried")] = 6,
    steps: Annotated[int, typer.Option(help="of each trial")] = 10,
    rows: Annotated[int, typer.Option(help="of the standard library's functions")] = 1000,
    layers: Annotated[int, typer.Option(help="of the model")] = 4,
    hidden: Annotated[int, typer.Option(help="size of the model")] = 256,
    folder: Annotated[
        Path | None, typer.Option(help="where model, rows and results stay; earlier rounds count")
    ] = None,
    append: Annotated[Path | None, typer.Option(help="also append the result to this Markdown file")] = None,
) -> None:
    """Measure and print; see the module's text."""
    folder = folder or Path(tempfile.mkdtemp(prefix="bench-tune-", dir=_made(runs_root())))
    length = 256
    sizes = Sizes(layers=layers, hidden=hidden, intermediate=4 * hidden, heads=max(1, hidden // 64))
    if not (folder / "rows.jsonl").exists():
        make(_made(folder), sizes, min(rows, 96), length)
        chosen = [each for each, _ in zip(functions(), range(rows), strict=False)]
        lines = [{"messages": [{"role": m.role, "content": m.content} for m in each.messages]} for each in chosen]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "base": str(folder / "base"), "data": [str(folder / "rows.jsonl")], "quantization": "nf4", "steps": steps,
        "batch_size": 4, "max_length": length, "warmup_steps": 2, "validate_every": steps, "validation_rows": 8,
        "checkpoint_every": 0, "keep_best": False, "cpus_per_worker": 1,
    }  # fmt: skip
    rates = [0.0001 * (turn + 1) for turn in range(trials)]
    kept = folder / "rounds.json"
    done: list[Round] = read_json(kept) if kept.exists() else []
    with connect():
        import ray

        there = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        for turn in range(rounds):
            measured: Round = {name: sweep(folder, config, rates, at_once, there) for name, at_once in SWEEPS.items()}
            measured |= {ALONE: alone(folder, config, rates, there), "parts": parts(folder, config)}
            done.append(measured)
            write_json(kept, done)
            print(f"round {turn + 1}: " + ", ".join(f"{s} {measured[s]['seconds']:.0f} s" for s in (*SWEEPS, ALONE)))
    text = heading("A sweep beside its trials one after the other", ["torch", "ray", "optuna"])
    text += (
        f"\nA Llama of {layers} layers, hidden {hidden}, NF4 with a LoRA; {trials} trials of {steps} steps of 4 rows "
    )
    text += f"of up to {length} tokens, of {rows:,} rows; one Ray for all, up already.\n\n{written(done, trials)}"
    write_down(text, append)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    typer.run(main)
