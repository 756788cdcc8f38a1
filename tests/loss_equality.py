"""The same training in one process, in two and in four: what ``test_loss_equality.py`` compares.

    .venv/bin/python tests/loss_equality.py --record     # writes tests/recorded/losses.json anew

A way to train is a row of ``WAYS``: add one, and every number of processes runs it.
"""

import argparse
import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kills import ROUNDS

RECORDED = Path(__file__).parent / "recorded" / "losses.json"

STEPS = 20

SHARED = [
    f"steps={STEPS}", "batch_size=4", "max_length=64", "learning_rate=0.004", "warmup_steps=2", "log_every=1",
    "validate_every=0", "workers=4", "seed=3", "adapter.rank=4",
]  # fmt: skip

WAYS = {
    "full": ["method=full", "quantization=none"],
    "lora": ["quantization=none"],
    "qlora": [],
    "full, recomputed": ["method=full", "quantization=none", "gradient_checkpointing=true"],
    "lora, recomputed": ["quantization=none", "gradient_checkpointing=true"],
    "qlora, recomputed": ["gradient_checkpointing=true"],
    "lora, packed": ["quantization=none", "packing=true"],
    "qlora, packed": ["packing=true"],
    "full, compiled": ["method=full", "quantization=none", "compile=true"],
    "lora, compiled": ["quantization=none", "compile=true"],
    "qlora, recomputed, compiled": ["gradient_checkpointing=true", "compile=true"],
    "full, distilled": ["method=full", "quantization=none", "distill.teacher={teacher}", "distill.temperature=3"],
}
"""Overrides of ``train sft``, in float32."""

STRATEGIES = ("fsdp2-offload", "zero2", "zero3")
"""Other ways to shard than WAYS' own; a way by one of them is named "lora by zero2"."""

WORLDS = (1, 2, 4)


def ways_of(world: int) -> list[str]:
    """The ways that ``world`` processes train; but in a soak only few of those that take long on two cores: four
    processes, compiled code, and other strategies."""
    ways = [way for way in WAYS if not way.endswith("compiled") or (ROUNDS > 1 and shutil.which("g++"))]
    plain = [way for way in ways if world < 4 or ROUNDS > 1 or way == "qlora, recomputed"]
    if world != 2:
        return plain
    short = {"qlora, recomputed": STRATEGIES, "full": ("zero3",)}
    others = {way: STRATEGIES for way in ways if not way.endswith("compiled")} if ROUNDS > 1 else short
    return plain + [f"{way} by {strategy}" for way in others for strategy in others[way]]


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_texts(count: int) -> list[tuple[str, str]]:
    """Sums to learn and their answers, each of another length."""
    return [(f"<|user|>{n} plus {n * n}<|assistant|>", f"{n + n * n} " * (1 + n % 4) + "<|end|>") for n in range(count)]


def make_rows(base: Path, count: int) -> list[Any]:
    """The sums as token rows whose labels cover the answer."""
    from transformers import AutoTokenizer

    from workloads.training.batches import IGNORE, Row

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for question, answer in make_texts(count):
        asked, said = tokenizer(question).input_ids, tokenizer(answer).input_ids
        rows.append(Row(asked + said, [IGNORE] * len(asked) + said, (question,)))
    return rows


def make_base(folder: Path, seed: int = 5, hidden: int = 64) -> None:
    """A random Llama of two layers, and a tokenizer trained on the rows."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    text = [part for texts in make_texts(60) for part in texts]
    bpe.train_from_iterator(text, 300, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, eos_token_id=tokenizer.eos_token_id, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


class Silent:
    """Events that nobody listens to."""

    def log(self, step: int, **values: float) -> None: ...

    def checkpoint(self, *_: Any) -> None: ...


def run_rank(rank: int, world: int, folder: Path) -> None:
    """Train every way as ``rank`` of ``world``; rank 0 writes the losses of each step."""
    import torch
    import torch.distributed as dist

    from workbench.config import load
    from workloads.fine_tune import fine_tune
    from workloads.sft import SftConfig

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it; DeepSpeed asks for it
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    losses = {}
    for name in ways_of(world):
        kind, _, strategy = name.partition(" by ")
        way = [override.format(teacher=folder / "teacher") for override in WAYS[kind]]
        way += [f"strategy={strategy}"] if strategy else []
        config = load(SftConfig, None, [f"base={json.dumps(str(folder / 'base'))}", *SHARED, *way])
        rows = make_rows(folder / "base", 60)
        done = fine_tune(
            config, rows[:50], rows[50:], device=torch.device("cpu"), events=Silent(), rank=rank,
            result=folder / f"result-{world}-{name}",
        )  # fmt: skip
        losses[name] = [loss for _, loss in done.history.train]
    if rank == 0:
        (folder / f"losses-{world}.json").write_text(json.dumps(losses))
    if world > 1:
        dist.destroy_process_group()


def run_all(folder: Path, worlds: tuple[int, ...] = WORLDS) -> dict[int, dict[str, list[float]]]:
    """The losses of each way by the number of processes. Forks: call it in a process that has not used torch yet."""
    import torch.multiprocessing as processes

    for module in ("workloads.fine_tune", "peft", "bitsandbytes"):  # once, before the forks
        importlib.import_module(module)

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if not (folder / "base").is_dir():
        processes.start_processes(_make_base_in, (folder,), 1, start_method="fork")
    for world in worlds:
        processes.start_processes(run_rank, (world, folder), world, start_method="fork")
    return {world: json.loads((folder / f"losses-{world}.json").read_text()) for world in worlds}


def _make_base_in(_: int, folder: Path) -> None:
    make_base(folder / "base")
    make_base(folder / "teacher", seed=6, hidden=96)


def main() -> None:
    """Write all losses to a file, or record those of one process."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--record", action="store_true", help=f"write {RECORDED.name} anew")
    arguments.add_argument("--to", type=Path, help="write the losses here instead")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.record:
            losses = run_all(Path(folder), (1,))[1]
            kept = {way: [round(loss, 6) for loss in losses[way]] for way in ("full", "lora", "qlora")}
            RECORDED.parent.mkdir(exist_ok=True)
            RECORDED.write_text(json.dumps(kept, indent=1) + "\n")
        else:
            given.to.write_text(json.dumps(run_all(Path(folder))))


if __name__ == "__main__":
    main()
