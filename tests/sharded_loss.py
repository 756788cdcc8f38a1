"""Two ranks of a sharded model against one process with the whole of it: loss and every gradient.

    .venv/bin/python tests/sharded_loss.py     # exits with an error where they differ

What ``test_sharded_loss.py`` runs, in a process of its own because it forks before torch has threads.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "regularised": {"tie_word_embeddings": True, "z_loss": 1e-2, "label_smoothing": 0.1},
    "lora on the head too": {"targets": ["q_proj", "lm_head"]},
    "qlora, recomputed": {"quantization": "nf4", "targets": "all-linear", "gradient_checkpointing": True},
    "qlora, recomputed, compiled": {
        "quantization": "nf4", "targets": ["q_proj", "down_proj"], "gradient_checkpointing": True, "compile": True,
    },
}  # fmt: skip


def make_model(folder: Path, targets: Any = None, quantization: Any = "none", tie_word_embeddings: bool = False) -> Any:
    """A random Llama of two layers, with a random adapter where ``targets`` names layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from workloads.training.adapters import add_adapter, load_base
    from workloads.training.config import AdapterConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=80, tie_word_embeddings=tie_word_embeddings, **sizes))
    if targets is None:
        return whole
    whole.save_pretrained(folder)  # writes on rank 0
    torch.distributed.barrier()
    torch.manual_seed(1)
    model = load_base(str(folder), "float32", quantization, torch.device("cpu"))
    torch.distributed.barrier()
    model = add_adapter(model, AdapterConfig(rank=2, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def compare(rank: int, folder: Path, case: dict[str, Any]) -> None:
    """Raise AssertionError where the sharded model differs from the whole one by more than 1e-5."""
    import torch
    import torch.distributed as dist

    from workloads.training.batches import IGNORE, Row
    from workloads.training.compiling import prepare_layers
    from workloads.training.config import TrainingConfig
    from workloads.training.fsdp import full_state, last_backward, shard
    from workloads.training.losses import summed_loss, training_loss

    cpu = torch.device("cpu")
    config = TrainingConfig(**{key: case[key] for key in case if key in TrainingConfig.model_fields})
    kind = {key: case[key] for key in case if key not in TrainingConfig.model_fields}
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, 80, (6 + index,), generator=draw).tolist() for index in range(8)]
    rows = [Row(row, [IGNORE] * 2 + row[2:]) for row in ids]
    rows[3] = Row(ids[3], [IGNORE] * len(ids[3]))  # a micro batch of rank 1 has no target at all
    targets = sum(row.targets for row in rows)

    whole = make_model(folder, **kind)
    expected = summed_loss(whole, rows, cpu, training_loss(config), 0).objective / targets
    expected.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}

    model = make_model(folder, **kind)
    prepare_layers(model, config)
    shard(model, torch.float32)
    total = torch.zeros(())
    mine = rows[rank::WORLD]
    for number, row in enumerate(mine):
        last_backward(model, number == len(mine) - 1)
        loss = summed_loss(model, [row], cpu, training_loss(config), 3).objective / targets
        (loss * WORLD).backward()
        total += loss.detach()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-5)
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys() == full_state(model).keys()
    for name in found:
        torch.testing.assert_close(found[name], gradients[name], rtol=0, atol=1e-5)
    with torch.no_grad():  # evaluation, on every rank's own rows
        held_out = summed_loss(model, mine, cpu, training_loss(config), 3).objective
        alone = summed_loss(whole, mine, cpu, training_loss(config), 0).objective
    torch.testing.assert_close(held_out / targets, alone / targets, rtol=0, atol=1e-5)


def run_rank(rank: int, folder: Path) -> None:
    """Every case, as one of the ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    real = torch.compile  # traced, not turned into C++ or Triton, which takes minutes and is tested elsewhere
    torch.compile = lambda *args, **keys: real(*args, **keys, backend="eager")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for name, case in CASES.items():
        compare(rank, folder, case)
        if rank == 0:
            print(name, flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks."""
    import torch.multiprocessing as processes

    import workloads.training.adapters
    import workloads.training.losses  # noqa: F401  # imported once, before the forks

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(run_rank, (Path(folder),), WORLD, start_method="fork")


if __name__ == "__main__":
    main()
