"""The corpus and the training function of ``train pretrain``."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig

from workbench.runs import Run
from workloads.chemistry import TASKS, answers, load_molecules, split_by_scaffold
from workloads.corpus import molecule_records, read_documents, sequences
from workloads.pretrain import PretrainConfig
from workloads.tokenizer import train_tokenizer
from workloads.training.batches import Batches, Row
from workloads.training.compiling import prepare_layers
from workloads.training.devices import check_cards, device_of
from workloads.training.distillation import distillation
from workloads.training.fsdp import full_state
from workloads.training.loop import train
from workloads.training.ray_train import WorkerEvents
from workloads.training.strategies import loads_on, optimizer_of, shard_model
from workloads.training.transformer import Transformer, to_llama

VALIDATION_SEQUENCES = 96

DOCUMENT_CHARACTERS = 1000
"""Of a document that are read: many beginnings, not a few whole ones."""


def build_corpus(config: PretrainConfig, run: Run, model: Path) -> dict[str, Any]:
    """Train the tokenizer into ``model`` and write the sequences; returns their files and the corpus' facts."""
    molecules, _ = load_molecules()
    split = split_by_scaffold(molecules, seed=config.split_seed)
    wanted = config.steps * config.batch_size
    copies = config.chemistry_copies or _copies(wanted, len(split["train"]))
    run.say(f"writing {copies} records of each of {len(split['train']):,} molecules")
    records = molecule_records(split["train"], copies=copies, randomised=config.randomised, seed=config.seed)
    held_out = molecule_records(split["validation"], copies=1, seed=config.seed)
    documents, cut = choose_documents(config, sum(map(len, records)))
    whose = "training the tokenizer" if config.distill is None else "with the teacher's tokenizer"
    run.say(f"{len(records):,} records and {len(documents):,} documents; {whose}")
    if cut:
        run.say(f"{cut:,} of the documents are longer than {DOCUMENT_CHARACTERS:,} characters; the rest is not read")
    if config.distill is None:
        tokenizer = train_tokenizer(records[:5000] + documents, config.vocabulary, config.model.context)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.distill.teacher, model_max_length=config.model.context)
    tokenizer.save_pretrained(str(model))
    texts = records + documents
    random.Random(f"order {config.seed}").shuffle(texts)
    rows = {
        "train": sequences(texts, tokenizer, config.max_length),
        "validation": sequences(held_out, tokenizer, config.max_length)[:VALIDATION_SEQUENCES],
    }
    run.artifact("record.txt").write_text(records[0])
    files = {}
    for part, ids in rows.items():
        files[part] = str(run.artifact(f"{part}.npz"))
        np.savez(files[part], ids=np.concatenate(ids).astype(np.int32), lengths=[len(piece) for piece in ids])
    facts = {
        "training molecules": len(split["train"]),
        "records of each": copies,
        "records": len(records),
        "documents": len(documents),
        f"documents cut after {DOCUMENT_CHARACTERS:,} characters": cut,
        "sequences": len(rows["train"]),
        "tokens": sum(map(len, rows["train"])),
        "passes over them": round(wanted / len(rows["train"]), 2),
        "vocabulary": len(tokenizer),
    }
    run.input("corpus", path=Path(files["train"]), **facts)
    samples = [(m.smiles, answers(m.smiles)) for m in split["validation"][:4]]
    files["samples"] = samples  # type: ignore[assignment]
    return {"files": files, "facts": facts}


def choose_documents(config: PretrainConfig, characters: int) -> tuple[list[str], int]:
    """As many beginnings of documents, in an order by the seed, as have their share beside so many ``characters`` of
    records; and how many of them are cut."""
    if not (config.documents and config.document_share):
        return [], 0
    wanted = characters * config.document_share / (1 - config.document_share)
    texts = read_documents(config.documents, limit=100_000, characters=DOCUMENT_CHARACTERS + 1)
    random.Random(f"documents {config.seed}").shuffle(texts)
    chosen: list[str] = []
    cut = 0
    for text in texts:
        if wanted <= 0:
            break
        chosen.append(text[:DOCUMENT_CHARACTERS])
        cut += len(text) > DOCUMENT_CHARACTERS
        wanted -= len(chosen[-1])
    return chosen, cut


def copies_needed(config: PretrainConfig, steps: int) -> int:
    """How many records of each molecule fill so many steps: ``chemistry_copies`` where it is not given."""
    return _copies(
        steps * config.batch_size, len(split_by_scaffold(load_molecules()[0], seed=config.split_seed)["train"])
    )


def _copies(wanted: int, molecules: int) -> int:
    return max(1, math.ceil(wanted / molecules))


def pretrain_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """The training function of a Ray Train worker: ``pretrain`` on its shard."""
    import ray.train

    config: PretrainConfig = payload["config"]
    rank = ray.train.get_context().get_world_rank()
    device = device_of(config)
    check_cards(payload["needed"], device, config.request().gpu_share)
    with WorkerEvents(Path(payload["run_folder"]), rank, config) as events:
        return pretrain(config, payload, device=device, events=events, result=Path(payload["result"]), rank=rank)


def pretrain(
    config: PretrainConfig,
    payload: dict[str, Any],
    *,
    device: torch.device,
    events: WorkerEvents,
    result: Path,
    rank: int = 0,
) -> dict[str, Any]:
    """A new Transformer, sharded where there is a process group, through the loop of every command, into ``result``.

    ``payload`` has what ``build_corpus`` wrote: the files of both parts, the samples, and as ``result`` the tokenizer.
    """
    rows = {part: [Row(ids, ids) for ids in read_sequences(payload[part])] for part in ("train", "validation")}
    tokenizer = AutoTokenizer.from_pretrained(payload["result"])

    torch.manual_seed(config.seed)  # the same new weights on every rank
    model = Transformer(llama_config(config, tokenizer)).to(loads_on(config, device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prepare_layers(model, config)
    shard_model(model, config, device)
    objective = distillation(config, device)
    optimizer = optimizer_of(model, config)
    batches = Batches(rows["train"], config.batch_size, config.seed)
    history = events.resume(model, optimizer)
    start = history.step
    train(
        model,
        batches,
        config,
        validation=rows["validation"],
        events=events,
        optimizer=optimizer,
        objective=objective,
        history=history,
    )
    if history.stopped_early:
        events.load_best(model)
    tokens = sum(len(row.ids) for step in range(history.step) for row in batches[step])
    state = full_state(model)  # collective
    samples = []
    if rank == 0:
        whole = to_llama(model.config, state)
        whole.save_pretrained(str(result))
        tokenizer.save_pretrained(str(result))
        samples = write_samples(whole, tokenizer, payload["samples"])
    return {
        "train": history.train, "validation": history.validation, "best": history.best, "parameters": parameters,
        "result": events.loaded or history.validation[-1],
        "steps": history.step, "stopped_early": history.stopped_early, "resumed_from": start, "tokens": tokens,
        "samples": samples,
    }  # fmt: skip


def read_sequences(file: str) -> list[list[int]]:
    """What ``build_corpus`` wrote: the ids of each sequence."""
    arrays = np.load(file)
    return [piece.tolist() for piece in np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])]


def llama_config(config: PretrainConfig, tokenizer: Any) -> LlamaConfig:
    """The architecture, with the tokenizer's special tokens."""
    heads = config.model.hidden_size // config.model.head_size
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.model.hidden_size,
        intermediate_size=config.model.mlp_size,
        num_hidden_layers=config.model.layers,
        num_attention_heads=heads,
        num_key_value_heads=config.model.key_value_heads or heads,
        head_dim=config.model.head_size,
        max_position_embeddings=config.model.context,
        initializer_range=config.model.initial_range,
        tie_word_embeddings=config.model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def write_samples(model: Any, tokenizer: Any, molecules: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
    """What the model says after "SMILES, property:", beside RDKit's answer."""
    model.eval()
    samples = []
    for index, (smiles, truth) in enumerate(molecules):
        for task in TASKS[index % 2 :: 2]:
            asked = tokenizer(f"{smiles}\n{task.name}:", return_tensors="pt", add_special_tokens=False).input_ids
            said = model.generate(input_ids=asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
            text = tokenizer.decode(said, skip_special_tokens=True).split(";")[0].strip()
            samples.append({"molecule": smiles, "property": task.name, "model": text, "truth": truth[task.name]})
    return samples
