"""The corpus and the training function of ``train pretrain``."""

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from workbench.errors import UserError
from workbench.runs import Run
from workloads.chemistry import TASKS, answers, load_molecules, split_by_scaffold
from workloads.corpus import molecule_records, pack, read_documents
from workloads.pretrain import PretrainConfig
from workloads.tokenizer import train_tokenizer
from workloads.training.fsdp import full_state, shard
from workloads.training.loop import Batches, Row, train
from workloads.training.ray_train import WorkerEvents, device_of

RECORD_TOKENS = 86
"""Mean length of a record with the default tokenizer: how many copies of the molecules the steps can use."""
VALIDATION_BLOCKS = 32


def build_corpus(config: PretrainConfig, run: Run, model: Path) -> dict[str, Any]:
    """Train the tokenizer into ``model`` and write the packed blocks; returns their files and the corpus' facts."""
    molecules, _ = load_molecules()
    split = split_by_scaffold(molecules, seed=config.split_seed)
    wanted = config.steps * config.batch_size * config.block
    copies = config.chemistry_copies or max(1, math.ceil(wanted / RECORD_TOKENS / len(split["train"])))
    run.say(f"writing {copies} records of each of {len(split['train']):,} molecules")
    records = molecule_records(split["train"], copies=copies, randomised=config.randomised, seed=config.seed)
    held_out = molecule_records(split["validation"], copies=1, seed=config.seed)
    documents: list[str] = []
    if config.documents and config.document_share:
        characters = sum(map(len, records)) * config.document_share / (1 - config.document_share)
        texts = read_documents(config.documents, limit=100_000, characters=1000)
        random.Random(f"documents {config.seed}").shuffle(texts)
        for text in texts:
            if characters <= 0:
                break
            documents.append(text)
            characters -= len(text)
    run.say(f"{len(records):,} records and {len(documents):,} documents; training the tokenizer")
    tokenizer = train_tokenizer(records[:5000] + documents, config.vocabulary, config.model.context)
    tokenizer.save_pretrained(str(model))
    texts = records + documents
    random.Random(f"order {config.seed}").shuffle(texts)
    blocks = {"train": pack(texts, tokenizer, config.block), "validation": pack(held_out, tokenizer, config.block)}
    if not blocks["train"] or not blocks["validation"]:
        raise UserError(f"the corpus fills no block of {config.block} tokens: lower block")
    run.artifact("record.txt").write_text(records[0])
    files = {}
    for part, rows in blocks.items():
        files[part] = str(run.artifact(f"{part}.npy"))
        np.save(files[part], np.array(rows[: VALIDATION_BLOCKS if part == "validation" else None], dtype=np.int32))
    used = len(blocks["train"]) * config.block
    facts = {
        "training molecules": len(split["train"]),
        "records of each": copies,
        "records": len(records),
        "documents": len(documents),
        "tokens": used,
        "passes over them": round(wanted / used, 2),
        "vocabulary": len(tokenizer),
    }
    run.input("corpus", path=Path(files["train"]), **facts)
    samples = [(m.smiles, answers(m.smiles)) for m in split["validation"][:4]]
    files["samples"] = samples  # type: ignore[assignment]
    return {"files": files, "facts": facts}


def pretrain_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """The training function of a Ray Train worker: a new Llama, sharded, through the loop of every command."""
    import ray.train

    config: PretrainConfig = payload["config"]
    rank = ray.train.get_context().get_world_rank()
    device = device_of(config)
    blocks = {part: np.load(payload[part]).tolist() for part in ("train", "validation")}
    rows = {part: [Row(ids, ids) for ids in ids_NT] for part, ids_NT in blocks.items()}
    tokenizer = AutoTokenizer.from_pretrained(payload["result"])

    torch.manual_seed(config.seed)  # the same new weights on every rank
    model = LlamaForCausalLM(llama_config(config, tokenizer)).to(device)
    parameters = model.num_parameters()
    if torch.distributed.is_initialized() and config.strategy == "fsdp2":
        shard(model, getattr(torch, config.compute_dtype))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    events = WorkerEvents(Path(payload["run_folder"]), rank)
    start = events.resume(model, optimizer)
    begun = time.monotonic()
    history = train(
        model,
        Batches(rows["train"], config.batch_size, config.seed),
        config,
        validation=rows["validation"],
        events=events,
        optimizer=optimizer,
        start=start,
    )
    seconds = time.monotonic() - begun
    events.close()
    state = full_state(model)  # collective
    samples = []
    if rank == 0:
        whole = LlamaForCausalLM(llama_config(config, tokenizer))
        whole.load_state_dict(state, strict=False)  # the head is the embedding, and is listed once
        whole.tie_weights()
        whole.save_pretrained(payload["result"])
        samples = write_samples(whole, tokenizer, payload["samples"])
    return {
        "train": history.train, "validation": history.validation, "parameters": parameters, "resumed_from": start,
        "tokens_per_second": (config.steps - start) * config.batch_size * config.block / seconds, "samples": samples,
    }  # fmt: skip


def llama_config(config: PretrainConfig, tokenizer: Any) -> LlamaConfig:
    """The architecture, with the tokenizer's special tokens; embedding and head share their weights."""
    heads = config.model.hidden_size // config.model.head_size
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.model.hidden_size,
        intermediate_size=config.model.mlp_size,
        num_hidden_layers=config.model.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.model.head_size,
        max_position_embeddings=config.model.context,
        initializer_range=config.model.initial_range,
        tie_word_embeddings=True,
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
